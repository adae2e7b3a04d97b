#!/usr/bin/env python3
"""Prepare the pinned llama.cpp tree, with our patch queue applied or without it.

    llama_tree.py prepare [--unpatched]   print the folder of the tree, made first if it is not there yet
    llama_tree.py sdist                   print the path of the pinned, verified sdist, fetched first if needed
    llama_tree.py bindings                print a folder with the sdist's Python files (llama_cpp/) and its licence
    llama_tree.py export TREE FOLDER      write TREE's commits back as the queue (same bytes as patches/)

The pin (patches/UPSTREAM) is the sdist of llama-cpp-python: it carries llama.cpp's git pack, so the queue is applied by
a real `git am`. pip fetches the sdist; ASRKF_LLAMA_CPP names a local copy instead (the sdist, or a git repository of
llama.cpp that has the pinned commit). Trees lie in ASRKF_CACHE (default: asrkf-gguf in the user's cache folder), one per digest of
pin + series + patches: a tree is never changed, a new queue makes a new one.

Standard library only: it runs inside the package's build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
IDENTITY = ["-c", "user.name=asrkf-gguf", "-c", "user.email=asrkf-gguf@localhost", "-c", "core.autocrlf=false"]


class TreeError(RuntimeError):
    """The tree cannot be prepared; the text says what to do."""


def default_cache_folder() -> Path:
    """Where the package has it, which asks platformdirs (tests/test_install.py compares them)."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "asrkf-gguf" / "Cache"
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or default) / "asrkf-gguf"


def cache_folder() -> Path:
    folder = Path(os.environ.get("ASRKF_CACHE") or default_cache_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_pin() -> dict[str, str]:
    lines = (line.split("=", 1) for line in (PATCHES / "UPSTREAM").read_text().splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in lines}


def read_series() -> list[Path]:
    return [PATCHES / line.strip() for line in (PATCHES / "series").read_text().splitlines() if line.strip()]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def digest_of_queue() -> str:
    digest = hashlib.sha256()
    for path in [PATCHES / "UPSTREAM", PATCHES / "series", *read_series()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def git(*arguments: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    result = subprocess.run(
        ["git", *IDENTITY, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise TreeError(f"git {arguments[0]} failed in {cwd}:\n{result.stdout}{result.stderr}")
    return result.stdout


def verified(sdist: Path, pin: dict[str, str]) -> Path:
    found = sha256_of(sdist)
    if found != pin["sha256"]:
        raise TreeError(f"{sdist} is not the pinned sdist: sha256 {found}, expected {pin['sha256']}")
    return sdist


def fetch_sdist(pin: dict[str, str]) -> Path:
    """The pinned sdist in the cache, downloaded by pip and verified."""
    name = f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    path = cache_folder() / name
    if not path.exists():
        print(f"fetching {name} (77 MB)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            requirement = f"{pin['package']}=={pin['version']}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", pin["package"], "--dest", folder, requirement]
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
                raise TreeError(f"pip could not fetch {requirement}; set ASRKF_LLAMA_CPP to a local copy of its sdist")
            verified(Path(folder) / name, pin).rename(path)
    return verified(path, pin)


def find_sdist(pin: dict[str, str]) -> Path:
    """The verified sdist: what ASRKF_LLAMA_CPP names, if that is a file, else from the cache or the package index."""
    local = os.environ.get("ASRKF_LLAMA_CPP")
    if local and not Path(local).exists():
        raise TreeError(f"ASRKF_LLAMA_CPP={local} does not exist; name the sdist or a git repository of llama.cpp")
    return verified(Path(local).resolve(), pin) if local and Path(local).is_file() else fetch_sdist(pin)


def prepare_bindings() -> Path:
    """The folder with llama_cpp/, the Python files of llama-cpp-python as they are, and LICENSE.md."""
    pin = read_pin()
    folder = cache_folder() / f"llama_cpp-{pin['version']}-{pin['sha256'][:12]}"
    if folder.exists():
        return folder
    sdist = find_sdist(pin)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch, tarfile.open(sdist) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.isfile() and (member.name == "LICENSE.md" or member.name.startswith("llama_cpp/")):
                archive.extract(member, Path(scratch) / "bindings")
        try:
            (Path(scratch) / "bindings").rename(folder)
        except OSError:
            if not folder.exists():  # another process may have been first
                raise
    return folder


def repository_with_pin(pin: dict[str, str], scratch: Path) -> Path:
    """A git folder that holds the pinned commit."""
    local = os.environ.get("ASRKF_LLAMA_CPP")
    if local and Path(local).is_dir():
        return Path(local).resolve()
    sdist = find_sdist(pin)
    inside = ".git/modules/vendor/llama.cpp/"
    with tarfile.open(sdist) as archive:
        for member in archive:
            where = member.name.find(inside)
            if where < 0 or not (member.isfile() or member.isdir()):
                continue
            member.name = "pack/" + member.name[where + len(inside) :]
            archive.extract(member, scratch)
    # the submodule's git folder names a work tree that is not there
    git("config", "--file", str(scratch / "pack" / "config"), "--unset-all", "core.worktree", cwd=scratch)
    return scratch / "pack"


def prepare(patched: bool = True) -> Path:
    """The folder of the prepared tree; made in a scratch folder and renamed, so a tree that exists is complete."""
    pin = read_pin()
    name = f"llama.cpp-{digest_of_queue()}" if patched else f"llama.cpp-upstream-{pin['commit'][:12]}"
    tree = cache_folder() / name
    if tree.exists():
        return tree
    print(f"preparing {tree}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        scratch = Path(folder)
        source = repository_with_pin(pin, scratch)
        work = scratch / "tree"
        work.mkdir()
        git("init", "--quiet", cwd=work)
        git("fetch", "--quiet", "--depth", "1", f"file://{source}", pin["commit"], cwd=work)
        git("checkout", "--quiet", "--detach", pin["commit"], cwd=work)
        if patched:
            git("am", "--quiet", "--committer-date-is-author-date", *map(str, read_series()), cwd=work)
        try:
            work.rename(tree)
        except OSError:
            if not tree.exists():  # another process may have been first
                raise
    return tree


def export(tree: Path, folder: Path) -> list[Path]:
    """Write the commits of `tree` above the pin as the queue, named by patches/series."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in read_series()]
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--quiet", "--no-signature", "--zero-commit", "--full-index", "--no-numbered", "--no-stat"]
        git("format-patch", *options, "-o", scratch, f"{read_pin()['commit']}..HEAD", cwd=tree)
        written = sorted(Path(scratch).iterdir())
        if len(written) != len(names):
            raise TreeError(f"{tree} has {len(written)} commits above the pin, patches/series names {len(names)}")
        return [Path(shutil.copyfile(path, folder / name)) for path, name in zip(written, names, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="print the folder of the tree, made if needed")
    prepare_parser.add_argument("--unpatched", action="store_true", help="upstream as it is at the pin")
    commands.add_parser("sdist", help="print the path of the verified sdist, fetched if needed")
    commands.add_parser("bindings", help="print the folder of llama_cpp's Python files, made if needed")
    export_parser = commands.add_parser("export", help="write a tree's commits as the queue")
    export_parser.add_argument("tree", type=Path)
    export_parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "prepare":
            print(prepare(patched=not arguments.unpatched))
        elif arguments.command == "sdist":
            print(find_sdist(read_pin()))
        elif arguments.command == "bindings":
            print(prepare_bindings())
        else:
            for path in export(arguments.tree, arguments.folder):
                print(path)
    except TreeError as error:
        print(f"llama_tree: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
