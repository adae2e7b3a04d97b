"""What is kept of a measurement: a row of a CSV file that says how it was made, and arrays of every position."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import llama_cpp
import numpy as np

from .. import _native
from .measure import Measured
from .sides import BATCH_TOKENS, Side

DESCRIPTION = ["date", "commit", "machine", "threads", "model", "command"]


def checkout() -> Optional[Path]:
    candidates = (Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve().parent.parent, Path.cwd())
    return next((path for path in candidates if (path / ".git").exists() and (path / "native/include/asrkf.h").exists()), None)


def results_file(name: str) -> Path:
    return (checkout() or Path.cwd()) / "results" / name


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")] or [platform.processor() or platform.machine()]
    return f"{names[0]} x{os.cpu_count()}"


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The first columns of every row."""
    root = checkout()
    commit = importlib.metadata.version("asrkf-gguf")
    if root:
        def git(*command: str) -> str:
            return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

        try:
            changes = git("status", "--porcelain", "--", "native", "patches", "asrkf_gguf")
            commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or it distrusts the folder's owner: the version is what is known
    program = Path(sys.argv[0])
    command = shlex.join([f"scripts/{program.name}" if program.parent.name == "scripts" else program.name, *sys.argv[1:]])
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": machine(), "threads": arguments.threads,
        "model": arguments.model.name, "command": command,
    }  # fmt: skip


class Table:
    """A CSV file that rows are appended to, each at once. Where there is a column `run`, it names a row, which is added once."""

    def __init__(self, path: Path, columns: list[str], again: bool = False) -> None:
        self.path, self.columns, self.rows = path, columns, []
        self._again = again
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
                if reader.fieldnames != columns:
                    raise ValueError(f"{path} has other columns than this version writes: move it away, or name another file with --out")
        else:
            path.write_text(",".join(columns) + "\n")

    def find(self, run: str) -> Optional[dict[str, Any]]:
        """The newest row of a run; None with --again, until it has been made anew."""
        return None if self._again else next((row for row in reversed(self.rows) if row["run"] == run), None)

    def add(self, row: dict[str, Any]) -> None:
        if "run" in self.columns and self.find(row["run"]):
            return
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


@functools.cache
def library_stamp() -> str:
    """Of the libraries' contents, not of the commit: a tree with changes has the commit of one without."""
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for path in _native.LIBRARY_FOLDER.glob(f"*{_native.LIBRARY.suffix}*")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_key(side: Side, length: int, arguments: argparse.Namespace, **more: Any) -> str:
    """Names a measurement by all that decides its outcome. Upstream's cache does not change with our library (tested)."""
    status = arguments.model.stat()
    parts = {
        "model": [arguments.model.name, status.st_size, status.st_mtime_ns], "side": dataclasses.asdict(dataclasses.replace(side, name="")),
        "library": library_stamp() if side.is_pooled else llama_cpp.__version__, "length": length, "batch": BATCH_TOKENS, **more,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_record(path: Path) -> Optional[dict[str, Any]]:
    """Arrays nll, kl and agree, and the row made of them; None if there is no such record."""
    if not path.exists():
        return None
    with np.load(path) as file:
        return {**{name: file[name] for name in ("nll", "kl", "agree")}, "row": json.loads(str(file["row"]))}


def save_record(path: Path, measured: Measured, row: dict[str, Any]) -> dict[str, Any]:
    part = path.with_suffix(".part.npz")
    np.savez(part, nll=measured.nll, kl=measured.kl, agree=measured.agree, row=np.array(json.dumps(row)))
    part.rename(path)
    return {"nll": measured.nll, "kl": measured.kl, "agree": measured.agree, "row": row}
