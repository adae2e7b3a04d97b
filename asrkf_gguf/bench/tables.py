"""The tables of README.md and docs/results.md, in markdown, made of the newest rows in results/."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..stats import MIB
from .records import results_file

Row = dict[str, Any]


def newest(path: Path, *keys: str) -> list[Row]:
    """Of the rows with the same keys the newest, where the first of them was."""
    with path.open(newline="") as file:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(file)}.values())


def spelled(row: Row) -> str:
    """A side as its policy says it: a name that was given on the command line explains nothing. 33 % is every table's pool."""
    words = shlex.split(row["command"])
    for option, value in itertools.pairwise(words):
        name, equals, policy = value.partition("=")
        if option == "--side" and equals and name == row["side"]:
            return ", ".join(part for part in policy.replace(";", ",").split(",") if part != "pool=0.33")
    return row["side"]


def mebibytes(n_bytes: float) -> str:
    return f"{n_bytes / MIB:.1f} MiB"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def made_by(rows: Iterable[Row]) -> list[str]:
    """The commands, and the commits that they ran on, below a table."""
    rows = list(rows)
    commits = dict.fromkeys(row["commit"] for row in rows)
    return ["", f"Rows of commit {', '.join(commits)}, made by", "", *(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows))]


# speed

def speed_rows() -> dict[tuple[str, str, str], Row]:
    """By metric, side, and what its ratio is to."""
    return {(row["metric"], row["side"], row["against"]): row for row in newest(results_file("speed.csv"), "metric", "side", "against")}


def speed_table() -> str:
    """Each metric, side and comparison."""
    rows = speed_rows().values()
    cells = []
    for row in rows:
        ratio = f"{float(row['ratio']):.2f} x {row['against']}" if row["ratio"] else ""
        cells.append((row["metric"], row["side"], f"{float(row['value']):.4g} {row['unit']}", ratio))
    return "\n".join([*markdown(("figure", "side", "value", "ratio"), cells), *made_by(rows)])


# quality

@dataclass
class Loss:
    """One side at one length: means over texts."""

    length: int
    side: str
    rows: list[Row]
    """One for each text."""

    def mean(self, key: str) -> float:
        return statistics.fmean(float(row[key]) for row in self.rows)

    @property
    def kl_error(self) -> float:
        """Standard error of the mean KL: positions are taken as independent, texts as given."""
        return math.sqrt(sum(float(row["kl_se"]) ** 2 for row in self.rows)) / len(self.rows)

    @property
    def device_bytes(self) -> float:
        return float(self.rows[0]["device_bytes"])

    @property
    def model(self) -> str:
        return str(self.rows[0]["model"])

    @property
    def policy(self) -> str:
        return str(self.rows[0]["config"]).split(",")[0]


def losses(path: Optional[Path] = None) -> list[Loss]:
    """By model and length, the least KL first; the newest row of each text counts."""
    groups: dict[tuple[str, int, str], Loss] = {}
    for row in newest(path or results_file("quality.csv"), "model", "length", "side", "text"):
        length, side = int(row["length"]), spelled(row)
        groups.setdefault((row["model"], length, side), Loss(length, side, [])).rows.append(row)
    return sorted(groups.values(), key=lambda loss: (loss.model, loss.length, loss.mean("kl_mean")))


def quality_table() -> str:
    """Quality and needles: each side, length, text and task."""
    head = ("tokens", "side", "device KV + index", "KL, mean", "KL by text", "perplexity ratio by text", "top-1")
    found = losses()
    cells = [
        (
            str(loss.length), loss.side, mebibytes(loss.device_bytes), f"{loss.mean('kl_mean'):.4f} ± {loss.kl_error:.4f}",
            ", ".join(f"{row['text']} {float(row['kl_mean']):.3f}" for row in loss.rows),
            ", ".join(f"{float(row['ppl_ratio']):.3f} ± {float(row['ppl_ratio_se']):.3f}" for row in loss.rows), f"{loss.mean('top1_ratio'):.3f}",
        )
        for loss in found
    ]  # fmt: skip
    return "\n".join([*markdown(head, cells), *made_by(row for loss in found for row in loss.rows), "", *needles_table()])


def needle_rows() -> list[Row]:
    return newest(results_file("needles.csv"), "length", "side", "task")


def needles_table() -> list[str]:
    found = needle_rows()
    tasks = list(dict.fromkeys(row["task"] for row in found))
    cells = []
    for length, side in dict.fromkeys((row["length"], spelled(row)) for row in found):
        rows = {row["task"]: row for row in found if (row["length"], spelled(row)) == (length, side)}
        counts = [f"{rows[task]['found']} of {rows[task]['asked']}" if task in rows else "" for task in tasks]
        cells.append((length, side, mebibytes(float(next(iter(rows.values()))["device_bytes"])), *counts))
    return [*markdown(("tokens", "side", "device KV + index", *tasks), cells), *made_by(found)]


def calibration_table() -> str:
    """Pools of a part of F16's bytes with a calibration and without."""
    head = ("model", "side", "device KV + index", "KL, mean", "KL by text", "same likeliest next token")
    found = [loss for loss in losses(results_file("calibration.csv")) if "%" in loss.side]
    cells = [
        (
            loss.model, loss.side, mebibytes(loss.device_bytes), f"{loss.mean('kl_mean'):.4f} ± {loss.kl_error:.4f}",
            ", ".join(f"{row['text']} {float(row['kl_mean']):.4f}" for row in loss.rows), f"{100 * loss.mean('top1_ratio'):.1f} %",
        )
        for loss in sorted(found, key=lambda loss: (loss.model, -loss.device_bytes, loss.mean("kl_mean")))
    ]  # fmt: skip
    return "\n".join([*markdown(head, cells), *made_by(row for loss in found for row in loss.rows)])


# README

DEPTHS = {"decode": 7680, "prefill": 8000}  # tokens, where the command does not say: the defaults of scripts/bench
LENGTH = 4096  # tokens, of the one text length that README shows


def depth_tokens(row: Row) -> int:
    words = shlex.split(row["command"])
    return int(words[words.index("--depth") + 1]) if "--depth" in words else DEPTHS[row["metric"]]


def gains_table() -> str:
    """Bytes on the device and tokens a second, beside upstream's full cache."""
    rows = speed_rows()

    def values(metric: str) -> tuple[float, float]:
        row = next(row for (name, side, _), row in rows.items() if (name, side) == (metric, "ours"))
        return float(rows[metric, "upstream full", ""]["value"]), float(row["value"])

    cells = []
    for label, metric in (("decoding, after {:,} tokens", "decode"), ("reading a prompt of {:,} tokens", "prefill")):
        row = rows[metric, "ours", "upstream full"]
        full, ours = values(metric)
        cells.append((label.format(depth_tokens(row)), f"{full:.1f} tok/s", f"{ours:.1f} tok/s", f"{float(row['ratio']):.2f}"))
    on_device = [values(metric) for metric in ("device KV", "device index", "compute buffers")]
    together = tuple(sum(side) for side in zip(*on_device, strict=True))
    for label, (full, ours) in (("KV cache on the device", on_device[0]), ("KV cache, index and compute buffers together", together)):
        cells.append((label, f"{full:.1f} MiB", f"{ours:.1f} MiB", f"{ours / full:.2f}"))
    return "\n".join(markdown(("gain", "full cache", "pool", "ratio"), cells))


def costs_table() -> str:
    """Bytes elsewhere, and what the answers lose."""
    rows = speed_rows()
    labels = {"device index": "index on the device", "compute buffers": "compute buffers on the device", "host KV": "host RAM for frozen tokens"}
    cells = []
    for metric, label in labels.items():
        mib = {side: float(row["value"]) for (name, side, _), row in rows.items() if name == metric}
        cells.append((label, *(f"{mib[side]:.1f} MiB" for side in ("upstream full", "ours"))))
    of_side = {loss.side: loss for loss in losses() if loss.length == LENGTH}
    sides = [of_side["full-f16"], of_side["asrkf"]]
    cells.append((f"KL to the full cache, texts of {LENGTH:,} tokens", *(f"{side.mean('kl_mean'):.4f} ± {side.kl_error:.4f} nats" for side in sides)))
    cells.append(("same likeliest next token", *(f"{100 * side.mean('top1_ratio'):.1f} %" for side in sides)))
    found = {row["side"]: row for row in needle_rows() if row["task"] == "passkey-text"}
    counts = [f"{found[side]['found']} of {found[side]['asked']}" for side in ("full-f16", "asrkf")]
    cells.append((f"numbers found again in texts of {int(found['asrkf']['length']):,} tokens", *counts))
    return "\n".join(markdown(("cost", "full cache", "pool"), cells))


# second looks

def looks_table() -> str:
    """Each text and side; changes are against the side that is the first of its command."""
    rows = newest(results_file("second_look.csv"), "text", "length", "side")
    head = ("text", "side", "device KV + index", "KL, mean", "change", "KL, 99th percentile", "looks", "processor time a token")
    cells = [
        (
            row["text"], spelled(row), mebibytes(float(row["device_bytes"])), f"{float(row['kl_mean']):.4f} ± {float(row['kl_se']):.4f}",
            f"{float(row['kl_change']):+.4f} ± {float(row['kl_change_se']):.4f}", f"{float(row['kl_p99']):.3f}",
            f"{row['second_looks']} of {row['positions']}", f"{1e3 * float(row['processor_seconds_per_token']):.1f} ms",
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join([*markdown(head, cells), *made_by(rows)])


# cuts

def cuts_table() -> str:
    """Each text and side of refreekv, and what its cuts kept."""
    rows = [row for row in newest(results_file("refreekv.csv"), "text", "length", "side") if row["kept_ratio"]]
    head = ("text", "prompt tokens", "side", "kept", "KL, mean", "top-1")
    cells = [
        (
            row["text"], str(int(row["length"]) - int(row["positions"])), spelled(row).replace(", pool=1.0", ""), f"{float(row['kept_ratio']):.1%}",
            f"{float(row['kl_mean']):.4f} ± {float(row['kl_se']):.4f}", f"{float(row['top1_ratio']):.3f}",
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join([*markdown(head, cells), *made_by(rows)])


# commands

def table(_arguments: argparse.Namespace) -> int:
    print(speed_table())
    return 0


def tables_of_quality(_arguments: argparse.Namespace) -> int:
    print(quality_table())
    return 0


def table_of_calibration(_arguments: argparse.Namespace) -> int:
    print(calibration_table())
    return 0


def table_of_looks(_arguments: argparse.Namespace) -> int:
    print(looks_table())
    return 0


def table_of_cuts(_arguments: argparse.Namespace) -> int:
    print(cuts_table())
    return 0


def tables_of_readme(_arguments: argparse.Namespace) -> int:
    print(f"{gains_table()}\n\n{costs_table()}")
    return 0
