"""Models on the Hugging Face hub: which file is meant, and that file, whole, in the hub's own cache.

huggingface-hub asks, reads, shows a bar, knows the token and keeps the cache. What it does not do (2.4) is done here:

- a download goes on where it was cut, also after the program ended: it keeps no half file;
- a file's hash is compared with the hub's;
- a disk that is too small is an error before the first byte, not a warning;
- a quantisation is enough to name a file, and a split model comes with all its parts.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Optional, Union

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from tqdm import tqdm

from .family import refuse
from .header import parts_of, read_header
from .stats import human

log = logging.getLogger("asrkf_gguf")

FORM = "hf:OWNER/REPO[@REVISION][:QUANT] or hf:OWNER/REPO[@REVISION]/FILE.gguf"
# What a broken connection raises, whichever HTTP library the hub's library uses: its base class, or OSError.
_NETWORK: tuple[type[BaseException], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
_HEADER_BYTES = 16 << 20  # the first try; a vocabulary alone takes megabytes


@dataclass(frozen=True)
class Name:
    """What a user asks for."""

    repository: str
    revision: str = "main"
    quant: str = ""
    file: str = ""
    """A path in the repository, or a pattern of one."""

    @classmethod
    def parse(cls, text: str) -> Name:
        """Of "hf:OWNER/REPO:QUANT" and its like (FORM); ValueError for anything else."""
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:/@]+))?(?::([\w.-]+)|/(.+))?", text)
        if not match:
            raise ValueError(f"{text!r} is not {FORM}")
        return cls(match[1], match[2] or "main", match[3] or "", match[4] or "")

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repository}{revision}" + (f":{self.quant}" if self.quant else f"/{self.file}" if self.file else "")

    def fits(self, path: str) -> bool:
        """Is it this file? A quantisation is a whole word: Q4_K is not Q4_K_M. Without a name, what is no language model is not meant."""
        if self.file:
            return fnmatch.fnmatch(path, self.file)
        word = rf"(?<![a-z0-9]){re.escape(self.quant.lower())}(?!_?[a-z0-9])"
        return not re.search(r"(^|/)mmproj|imatrix", path.lower()) and bool(re.search(word, path.lower()) if self.quant else True)


@dataclass(frozen=True)
class File:
    """A file of a repository."""

    path: str
    n_bytes: int
    digest: str = ""
    """What the hub names the content by: sha256 of a large file (LFS), git's hash of a small one. The cache's name for it, too."""

    def has(self, content: Path) -> bool:
        """Is this its content?"""
        is_large = len(self.digest) == 64
        digest = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % self.n_bytes)
        bar = tqdm(total=self.n_bytes, desc="checking", unit="B", unit_scale=True, disable=None, leave=False)
        with content.open("rb") as file, bar:
            while piece := file.read(1 << 20):
                digest.update(piece)
                bar.update(len(piece))
        return digest.hexdigest() == self.digest


def _choose(name: Name, files: Sequence[File], where: str) -> list[File]:
    """The one file that is meant, or all its parts; ValueError, with what there is, if that is not clear."""
    there = {file.path: file for file in files if file.path.endswith(".gguf")}
    firsts = [file for path, file in there.items() if parts_of(PurePosixPath(path))[0] == PurePosixPath(path)]
    wanted = [file for file in firsts if name.fits(file.path)]
    if not there:
        raise ValueError(f"{name}: {where} has no GGUF file; converted models are mostly in repositories whose names end in -GGUF")
    if len(wanted) != 1:
        listed = ", ".join(f"{file.path} ({human(_model_bytes(file, there))})" for file in firsts) or "later parts only"
        raise ValueError(f"{name}: {len(wanted) or 'no'} files fit; there are: {listed}. Write {FORM}")
    parts = [str(part) for part in parts_of(PurePosixPath(wanted[0].path))]
    missing = [part for part in parts if part not in there]
    if missing:
        raise ValueError(f"{name}: {where} lacks {len(missing)} of the {len(parts)} parts: {', '.join(missing)}")
    return [there[part] for part in parts]


def _model_bytes(first: File, there: dict[str, File]) -> int:
    return sum(there[str(part)].n_bytes for part in parts_of(PurePosixPath(first.path)) if str(part) in there)


@contextlib.contextmanager
def _explained(name: Name) -> Iterator[None]:
    """RuntimeError, in one line that says what to do, for what the hub's library raises."""
    page = f"{constants.ENDPOINT}/{name.repository}"
    login = "log in (hf auth login) or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        then = f"then {login}" if huggingface_hub.get_token() is None else "with the account of your token"
        raise RuntimeError(f"{name}: the repository is gated: ask for access at {page}, {then}") from error
    except errors.RepositoryNotFoundError as error:
        raise RuntimeError(f"{name}: there is no {page}, or it is private: check the name; for a private one {login}") from error
    except errors.RevisionNotFoundError as error:
        raise RuntimeError(f"{name}: {page} has no revision {name.revision!r}") from error
    except errors.EntryNotFoundError as error:
        raise RuntimeError(f"{name}: a file of it is not at {page}: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = f"the token is not accepted: {login} anew" if status in (401, 403) else str(error)
        raise RuntimeError(f"{name}: {page} answered {status}: {remedy}") from error
    except _NETWORK as error:
        if getattr(error, "filename", None):  # of this machine: its text says which file, and why
            raise
        raise RuntimeError(f"{name}: {error or type(error).__name__}; run it again: what was fetched is kept, and it goes on from there") from error


class _Cache:
    """The part of the hub's cache that holds one repository."""

    def __init__(self, name: Name, root: Union[str, os.PathLike[str], None]) -> None:
        self.root = Path(root or constants.HF_HUB_CACHE)
        self.folder = self.root / repo_folder_name(repo_id=name.repository, repo_type="model")
        self.revision = name.revision

    def blob(self, file: File) -> Path:
        return self.folder / "blobs" / file.digest

    def half(self, file: File) -> Path:
        return self.folder / "blobs" / f"{file.digest}.asrkf.incomplete"

    def lock(self, file: File) -> Path:
        return self.root / ".locks" / self.folder.name / f"{file.digest}.asrkf.lock"

    def n_missing_bytes(self, file: File) -> int:
        if self.blob(file).exists():
            return 0
        return file.n_bytes - (self.half(file).stat().st_size if self.half(file).exists() else 0)

    def files(self) -> tuple[Path, list[File]]:
        """A folder, and the files of the revision that are in it."""
        ref = self.folder / "refs" / self.revision
        snapshot = self.folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else self.revision)
        return snapshot, [File(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in sorted(snapshot.rglob("*.gguf"))]


class _NoAnswer(Exception):
    """There is no connection to the hub, or none is wanted; the cause says which."""


def _ask(name: Name) -> tuple[str, list[File]]:
    """The commit that the revision is now, and the files in it."""
    try:
        about: Any = huggingface_hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    except errors.HfHubHTTPError:
        raise
    except _NETWORK as error:
        raise _NoAnswer from error
    found = about.siblings or []
    return about.sha, [File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id or "") for one in found]


def fetch(name: Name, cache: Union[str, os.PathLike[str], None] = None) -> Path:
    """The file that `name` means (of a split model the first; all are there), from the hub or, if it is there, from the cache.

    Without a connection, or with HF_HUB_OFFLINE, from the cache alone. ValueError, with what there is, if the choice is not clear or the
    file is not a model; RuntimeError with the remedy if the hub does not give it.
    """
    mine = _Cache(name, cache)
    with _explained(name):
        try:
            commit, files = _ask(name)
        except _NoAnswer as silence:
            return _from_cache(name, mine, silence.__cause__)
        parts = _choose(name, files, "the repository")
        for part in parts:
            _forget_damaged(mine, part)
        if any(mine.n_missing_bytes(part) for part in parts):
            _check_space(name, mine, parts)
            with tempfile.TemporaryDirectory() as scratch:
                refuse(_headers(name, commit, parts, Path(scratch)))
            for part in parts:
                _fetch_content(name, commit, part, mine)
        first, *_ = [_link(name, commit, part, mine) for part in parts]
        return first


def _from_cache(name: Name, mine: _Cache, error: Optional[BaseException]) -> Path:
    snapshot, files = mine.files()
    is_wanted = isinstance(error, errors.OfflineModeIsEnabled)
    if not files:
        reason = "HF_HUB_OFFLINE is set" if is_wanted else f"the hub does not answer ({error or type(error).__name__})"
        raise RuntimeError(f"{name}: {reason}, and the cache has no file of it ({mine.folder})") from error
    if not is_wanted:
        log.warning("%s: the hub does not answer (%s): taking the copy in %s", name, error, snapshot)
    return snapshot / _choose(name, files, f"the cache ({snapshot})")[0].path


def _forget_damaged(mine: _Cache, part: File) -> None:
    """A file of another size in the cache is not the one, whoever left it there."""
    blob = mine.blob(part)
    if blob.exists() and blob.stat().st_size != part.n_bytes:
        log.warning("%s in the cache has %d bytes, not %d: it is fetched again", part.path, blob.stat().st_size, part.n_bytes)
        blob.unlink()


def _check_space(name: Name, mine: _Cache, parts: Sequence[File]) -> None:
    wanted_bytes = sum(mine.n_missing_bytes(part) for part in parts)
    there = next(folder for folder in (mine.folder, *mine.folder.parents) if folder.exists())
    if (free_bytes := shutil.disk_usage(there).free) < wanted_bytes:
        raise RuntimeError(f"{name}: {human(wanted_bytes)} are to be fetched, and {mine.root} has {human(free_bytes)} free: make room, "
                           "or set HF_HUB_CACHE to a folder on a larger disk")  # fmt: skip


def _fetch_content(name: Name, commit: str, part: File, mine: _Cache) -> None:
    """Fetch what is missing of a file, and let it be whole only if its hash is right."""
    blob, half = mine.blob(part), mine.half(part)
    blob.parent.mkdir(parents=True, exist_ok=True)
    mine.lock(part).parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(mine.lock(part)):
        if blob.exists():  # fetched before, or by another process since
            return
        if half.exists() and half.stat().st_size > part.n_bytes:
            half.unlink()
        _read_on(name, commit, part, half)
        if not part.has(half):
            half.unlink()
            raise RuntimeError(f"{name}: {part.path} does not have the hub's hash {part.digest}: damaged on the way, and deleted; run it again")
        half.rename(blob)


def _read_on(name: Name, commit: str, part: File, half: Path) -> None:
    """Append to a half file until it has all bytes; raises what cuts the connection if nothing came between two cuts."""
    url, n_before = huggingface_hub.hf_hub_url(name.repository, part.path, revision=commit), -1
    while True:
        with half.open("ab") as out:
            try:
                http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=part.n_bytes, displayed_filename=part.path)
                return
            except errors.HfHubHTTPError:
                raise
            except _NETWORK as error:  # of a cut: http_get goes on by itself only after some kinds
                n_read = out.tell()
                if n_read == n_before:
                    raise
                log.warning("%s: cut at %s (%s): going on", part.path, human(n_read), error or type(error).__name__)
                n_before = n_read


def _link(name: Name, commit: str, part: File, mine: _Cache) -> Path:
    """The cache's name for a file whose content is there. The hub's library makes it; no content is fetched."""
    path = Path(huggingface_hub.hf_hub_download(name.repository, part.path, revision=name.revision, cache_dir=mine.root))
    if commit not in path.parts:
        raise RuntimeError(f"{name}: the repository changed while it was read: run it again")
    return path


def header_of(text: str, folder: Path) -> Path:
    """The header of a model on the hub as a sparse file of the true size in `folder`, of a split model the headers of all parts: what a
    loader needs that reads no weights. The weights are not fetched. Without a connection, the whole file in the cache. Raises what fetch()
    raises.
    """
    name = Name.parse(text)
    with _explained(name):
        try:
            commit, files = _ask(name)
        except _NoAnswer as silence:
            return _from_cache(name, _Cache(name, None), silence.__cause__)
        return _headers(name, commit, _choose(name, files, "the repository"), folder)


def _headers(name: Name, commit: str, parts: Sequence[File], folder: Path) -> Path:
    hub = huggingface_hub.HfFileSystem()
    for part in parts:
        _fetch_header(hub, f"{name.repository}@{commit}/{part.path}", part.n_bytes, folder / PurePosixPath(part.path).name)
    return folder / PurePosixPath(parts[0].path).name


def _fetch_header(hub: Any, remote: str, n_bytes: int, local: Path) -> None:
    """Read the beginning of a file, more of it until the whole header is there."""
    n_read, is_whole = 0, False
    while n_read < n_bytes and not is_whole:
        n_wanted = min(n_bytes, max(_HEADER_BYTES, 4 * n_read))
        with local.open("ab") as out:
            out.write(hub.cat_file(remote, start=n_read, end=n_wanted))
        n_read = n_wanted
        with local.open("rb") as file:
            is_whole = read_header(local) is not None or file.read(4) != b"GGUF"  # whoever reads it next says what it is
    with local.open("ab") as out:
        out.truncate(n_bytes)
