"""The patch queue: applies cleanly, exports to the same bytes, says what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
sys.path.insert(0, str(ROOT / "scripts"))

import llama_tree  # noqa: E402


def queue() -> list[str]:
    return [path.name for path in llama_tree.read_series()]


def test_series_lists_every_patch_once():
    assert sorted(queue()) == sorted(path.name for path in PATCHES.glob("*.patch"))


def test_readme_explains_every_patch():
    readme = (PATCHES / "README.md").read_text()
    assert all(name in readme for name in queue())


def test_the_queue_stays_small_and_additive():
    added = removed = 0
    for path in llama_tree.read_series():
        lines = path.read_text().splitlines()
        added += sum(line.startswith("+") and not line.startswith("+++") for line in lines)
        removed += sum(line.startswith("-") and not line.startswith(("---", "-- ")) for line in lines)
    assert added <= 250
    assert removed <= 10


def test_tree_exports_the_same_bytes(tmp_path: Path):
    tree = llama_tree.prepare()
    written = llama_tree.export(tree, tmp_path)
    assert [path.name for path in written] == queue()
    for path in written:
        assert path.read_bytes() == (PATCHES / path.name).read_bytes(), path.name


def test_preparing_twice_gives_the_same_untouched_tree():
    first = llama_tree.prepare()
    head = llama_tree.git("rev-parse", "HEAD", cwd=first)
    assert llama_tree.prepare() == first
    assert llama_tree.git("rev-parse", "HEAD", cwd=first) == head
    assert llama_tree.git("status", "--porcelain", "--untracked-files=no", cwd=first) == ""


def test_a_fresh_tree_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = llama_tree.prepare()
    # the prepared tree holds the pinned commit: it can serve as the local copy, without the network
    monkeypatch.setenv("ASRKF_LLAMA_CPP", str(known))
    monkeypatch.setenv("ASRKF_CACHE", str(tmp_path))
    fresh = llama_tree.prepare()
    assert fresh != known
    assert llama_tree.git("rev-parse", "HEAD", cwd=fresh) == llama_tree.git("rev-parse", "HEAD", cwd=known)


@pytest.mark.parametrize(("content", "part"), [(b"not the sdist", "not the pinned sdist"), (None, "does not exist")])
def test_a_wrong_local_copy_is_refused(tmp_path: Path, content: bytes | None, part: str):
    path = tmp_path / "sdist.tar.gz"
    if content is not None:
        path.write_bytes(content)
    environment = {**os.environ, "ASRKF_LLAMA_CPP": str(path), "ASRKF_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "scripts/llama_tree.py"), "prepare"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert part in result.stderr
    assert not list((tmp_path / "cache").glob("llama.cpp*"))
