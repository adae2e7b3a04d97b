"""A run of a model as CSV: one file of its steps, and one beside it of where the tokens were at its end.

The columns of the steps are those of struct asrkf_step (asrkf.h says what each is); those of the map are a layer group with its
number of layers, and positions [begin, end) that were in one state.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .llama import Llama

STEP_COLUMNS = {"pos", "n_tokens", "active_cells", "frozen_cells", "missed_attention_ratio", "missed_attention_worst_ratio", "entropy", "occasion"}
"""Of the steps: those that a picture needs."""
MAP_COLUMNS = ("group", "n_layers", "begin", "end", "state")


@dataclass(frozen=True)
class Trace:
    """Of a file that was read: numbers, but the state of a run."""

    steps: list[dict[str, float]]
    runs: list[dict[str, Any]]


def map_file(path: Path) -> Path:
    """trace.csv has trace.map.csv beside it."""
    return path.with_name(path.stem + ".map.csv")


@contextlib.contextmanager
def tracing(llm: Llama, path: Path) -> Iterator[None]:
    """Both files of what a model does in the with block, also if that ends by an error. OSError before it if they cannot be written,
    KVError for upstream's cache, which has no steps to tell of."""
    trace = llm.kv_trace()
    try:
        with trace:
            for file in (path, map_file(path)):
                file.open("w").close()  # now, and not after hours
            try:
                yield
            finally:
                _write(map_file(path), MAP_COLUMNS, _runs(llm))
    finally:
        if trace.steps:
            _write(path, tuple(trace.steps[0]), trace.steps)


def _runs(llm: Llama) -> Iterator[dict[str, Any]]:
    for index, group in enumerate(llm.kv_stats().groups):
        for begin, end, state in llm.kv_runs(index):
            yield dict(zip(MAP_COLUMNS, (index, group.n_layers, begin, end, state), strict=True))


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_trace(path: Path) -> Trace:
    """What tracing() wrote; without the map if that is not there. ValueError if the file is another one, or holds no step."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(rows[0]) >= STEP_COLUMNS:
        raise ValueError(f"{path} is no trace of steps: asrkf run MODEL --trace FILE writes one")
    try:
        steps = [{name: float(value) for name, value in row.items()} for row in rows]
        runs = []
        if map_file(path).exists():
            with map_file(path).open(newline="") as file:
                runs = [{name: value if name == "state" else int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return Trace(steps, runs)
