"""A report as tables for a terminal, and as CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..stats import MIB
from .report import Figures, Memory, Report, SideReport, Spread

KINDS = {"K and V": "device_kv_bytes", "index": "device_index_bytes", "staging": "device_staging_bytes", "compute": "device_compute_bytes",
         "in RAM": "host_kv_bytes"}  # fmt: skip
"""Of memory, and the field of each. A kind of which no side has anything is left out."""


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The side's name first; figures that there are not are empty."""


def tables(report: Report) -> list[Table]:
    """Memory, speed and predictions."""
    return [_memory(report), _speed(report), _predictions(report)]


def _memory(report: Report) -> Table:
    kinds = {label: name for label, name in KINDS.items() if any(getattr(side.memory, name, 0) for side in report.sides)}

    def row(side: SideReport) -> list[str]:
        if side.memory is None:
            return [side.name]
        sizes = (f"{getattr(side.memory, name) / MIB:.1f}" for name in kinds.values())
        return [side.name, side.types, f"{side.pool_cells:,}", *sizes, f"{side.load_seconds.median:.2f}" if side.load_seconds else ""]

    weights = ", ".join(f"{size / MIB:.1f} MiB on {name}" for name, size in report.weights_bytes.items() if size)
    return Table(f"Memory, MiB (weights: {weights})", ("cache", "type", "cells", *kinds, "load s"), [row(side) for side in report.sides])


def _speed(report: Report) -> Table:
    depths = report.depths

    def row(side: SideReport) -> list[str]:
        cells = [side.name]
        for name in ("read_tokens_per_second", "decode_tokens_per_second"):
            cells += [_at(side, depth, lambda figures, name=name: _spread(getattr(figures, name))) for depth in depths]  # type: ignore[misc]
        return [*cells, _at(side, depths[-1], lambda figures: f"{figures.decode_ratio.median:.2f}") if depths else ""]

    head = ["cache", *(f"read to {depth:,}" for depth in depths), *(f"decode at {depth:,}" for depth in depths), "ratio"]
    title = f"Speed, tokens a second: median over the rounds, ± half their spread; ratio: decoding at the end, beside {report.reference}"
    return Table(title, head, [row(side) for side in report.sides])


def _predictions(report: Report) -> Table:
    depth = max(report.depths, default=0)

    def row(side: SideReport) -> list[str]:
        figures = side.at(depth)
        facts = f"{side.facts_found} of {side.facts_asked}" if side.facts_asked else ""
        if figures is None:
            return [side.name, *[""] * 6, facts]
        missed = "" if figures.missed_attention_ratio is None else f"{100 * figures.missed_attention_ratio:.1f} %"
        return [
            side.name, f"{figures.kl_mean:.4f} ± {figures.kl_se:.4f}", f"{figures.kl_p99:.3f}", f"{figures.ppl:.4g}",
            f"{figures.ppl_ratio:.3f} ± {figures.ppl_ratio_se:.3f}", f"{100 * figures.top1_ratio:.1f} %", missed, facts,
        ]  # fmt: skip

    n = max((figures.positions for _, figures in report.at_end().values()), default=0)
    head = ("cache", "KL, mean", "KL, p99", "perplexity", "its ratio", "same top token", "missed attention", "facts found")
    return Table(f"Predictions of {n} tokens after {depth:,}, beside {report.reference}", head, [row(side) for side in report.sides])


def _at(side: SideReport, depth: int, show: Callable[[Figures], str]) -> str:
    figures = side.at(depth)
    return show(figures) if figures else ""


def _spread(figure: Spread) -> str:
    half = (figure.most - figure.least) / 2
    return f"{figure.median:.1f}" + (f" ± {half:.1f}" if figure.rounds > 1 else "")


def to_text(report: Report, readings: list[str]) -> str:
    about = report.about
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    lines = [f"{about['model']}, {report.n_ctx:,} tokens of context, {about['machine']}, {threads}; text: {report.text}"]
    if not report.is_complete:
        lines.append(f"PARTIAL: {report.stopped} ended the run early; the figures are of what was measured until then.")
    for table in tables(report):
        width = len(table.head)
        rows = [[*row, *[""] * (width - len(row))] for row in table.rows]
        lines += ["", table.title, tabulate(rows, table.head, disable_numparse=True, colalign=("left", *["right"] * (width - 1)))]
    lines += ["", *(f"{side.name}: {side.refused}" for side in report.sides if side.refused), *report.notes, *readings]
    return "\n".join(lines)


# CSV: a row for each side and depth; of a side that could not be had one row, with the reason

_FIGURES = [field.name for field in dataclasses.fields(Figures)]
_SPREADS = {"load_seconds", *(field.name for field in dataclasses.fields(Figures) if field.type == "Spread")}
_MEMORY = [field.name for field in dataclasses.fields(Memory)]
_SIDE = ["config", "type_k", "type_v", "pool_cells", "refused", "facts_found", "facts_asked", "load_seconds"]


def write_csv(report: Report, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*report.about, "text", "n_ctx", "is_complete", "side", *_columns(_SIDE), *_MEMORY, *_columns(_FIGURES)])
        for side in report.sides:
            fixed = [*report.about.values(), report.text, report.n_ctx, report.is_complete, side.name]
            fixed += [*_values(side, _SIDE), *_values(side.memory, _MEMORY)]
            writer.writerows([*fixed, *_values(figures, _FIGURES)] for figures in side.depths or (None,))


def _columns(names: Sequence[str]) -> list[str]:
    """A spread takes three."""
    return [column for name in names for column in ((name, f"{name}_least", f"{name}_most") if name in _SPREADS else (name,))]


def _values(source: Any, names: Sequence[str]) -> list[Any]:
    """Empty where there are none."""
    values: list[Any] = []
    for name in names:
        value = getattr(source, name, None)
        if name in _SPREADS:
            values += [value.median, value.least, value.most] if value else [None] * 3
        else:
            values.append(value)
    return values
