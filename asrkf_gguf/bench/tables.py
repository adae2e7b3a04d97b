"""README's tables, in markdown, of the newest rows in results/."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterable
from typing import Any

from ..stats import MIB
from .records import results_file


def newest(name: str, *keys: str) -> list[dict[str, Any]]:
    """Of the rows of results/NAME with the same keys the newest, where the first of them was."""
    with results_file(name).open(newline="") as file:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(file)}.values())


def made_by(rows: Iterable[dict[str, Any]]) -> list[str]:
    return ["", "Made by " + " and ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows)) + "."]


def speed_table() -> str:
    """Each metric, side and comparison."""
    lines = ["| figure | side | value | ratio | command |", "| --- | --- | --- | --- | --- |"]
    for row in newest("speed.csv", "metric", "side", "against"):
        ratio = f"{float(row['ratio']):.2f} x {row['against']}" if row["ratio"] else ""
        lines.append(f"| {row['metric']} | {row['side']} | {float(row['value']):.4g} {row['unit']} | {ratio} | `{row['command']}` |")
    return "\n".join(lines)


def quality_table() -> str:
    """Quality and needles: each side, length, text and task, lowest KL first."""
    head = "| tokens | side | device KV + index | KL, mean | KL by text | perplexity ratio by text | top-1 |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in newest("quality.csv", "length", "side", "text"):
        groups.setdefault((int(row["length"]), row["side"]), []).append(row)

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows)

    for (length, side), rows in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1], "kl_mean"))):
        kl = ", ".join(f"{row['text']} {float(row['kl_mean']):.3f}" for row in rows)
        ratio = ", ".join(f"{float(row['ppl_ratio']):.3f} ± {float(row['ppl_ratio_se']):.3f}" for row in rows)
        lines.append(f"| {length} | {side} | {mebibytes(rows[0])} | {mean(rows, 'kl_mean'):.4f} | {kl} | {ratio} | {mean(rows, 'top1_ratio'):.3f} |")
    lines += made_by(row for rows in groups.values() for row in rows)
    return "\n".join([*lines, "", *needles_table()])


def needles_table() -> list[str]:
    found = newest("needles.csv", "length", "side", "task")
    tasks = list(dict.fromkeys(row["task"] for row in found))
    lines = [f"| tokens | side | device KV + index | {' | '.join(tasks)} |", "| --- | --- | --- |" + " --- |" * len(tasks)]
    for length, side in dict.fromkeys((row["length"], row["side"]) for row in found):
        rows = {row["task"]: row for row in found if (row["length"], row["side"]) == (length, side)}
        counts = " | ".join(f"{rows[task]['found']} of {rows[task]['asked']}" if task in rows else "" for task in tasks)
        lines.append(f"| {length} | {side} | {mebibytes(next(iter(rows.values())))} | {counts} |")
    return lines + made_by(found)


def mebibytes(row: dict[str, Any]) -> str:
    return f"{float(row['device_bytes']) / MIB:.1f} MiB"


def table(_arguments: argparse.Namespace) -> int:
    print(speed_table())
    return 0


def tables_of_quality(_arguments: argparse.Namespace) -> int:
    print(quality_table())
    return 0
