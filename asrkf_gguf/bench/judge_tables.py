"""The judge's tables in markdown, of the rows of judge.csv and judge_tasks.csv; and its goals."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .needles import SOLVED_RATIO
from .records import results_file
from .tables import Row, made_by, markdown, mebibytes, newest


class Goal(NamedTuple):
    """What a side shall reach; of a loss, in the worst of the texts."""

    side: str
    length: int
    figure: str
    most: float
    name: str


MODEL, LENGTH = "SmolLM2-135M-Instruct.Q4_1.gguf", 4096  # that README shows
OF_Q8_0 = "KL of the full Q8_0 cache's"
WORST_OF_Q8_0 = "times the full Q8_0 cache's KL, worst text"
LENGTHS = (4096, 8192)
POOLS = ("1/3", "1/4", "1/8", "1/8 own")
GOALS = [
    *(Goal(side, length, "worst_of_q8_0", 1.2, OF_Q8_0) for length in LENGTHS for side in ("asrkf 1/3", "asrkf 1/3 q8_0")),
    *(Goal(side, length, "worst_of_q8_0", 1.8, OF_Q8_0) for length in LENGTHS for side in ("asrkf 1/4", "asrkf 1/4 own")),
    *(Goal(side, length, "worst_kl", 0.020, "KL") for length in LENGTHS for side in ("asrkf 1/8", "asrkf 1/8 own")),
    Goal("asrkf 1/3 f16", 4096, "worst_kl", 0.015, "KL"), Goal("asrkf 1/3 f16", 8192, "worst_kl", 0.030, "KL"),
    *(Goal(f"asrkf {pool}", length, "ppl_ratio", 1.02, "perplexity ratio, all texts") for length in LENGTHS for pool in POOLS),
]  # fmt: skip


def judge_tables(folder: Path) -> str:
    """For each model: its texts, its tasks, and which goals are reached."""
    rows = newest(folder / "judge.csv", "model", "length", "side")
    asked = folder / "judge_tasks.csv"
    tasks = newest(asked, "model", "length", "side", "task") if asked.exists() else []
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        parts += [f"**{model}**", "", *texts_table(of_model), ""]
        of_length: dict[str, list[Row]] = {}
        for row in tasks:
            if row["model"] == model:
                of_length.setdefault(row["length"], []).append(row)
        for rows_of_length in of_length.values():
            parts += [*tasks_table(rows_of_length), ""]
        if goals := goals_table(of_model):
            parts += [*goals, ""]
    return "\n".join([*parts, *made_by([*rows, *tasks])])


def texts_table(rows: list[Row]) -> list[str]:
    """The most bytes first, length by length."""
    head = ("tokens", "side", "device K, V, index", "KL, mean", "95th, 99th percentile", "worst text", WORST_OF_Q8_0, "perplexity ratio", "top-1")
    cells = [
        (
            row["length"], row["side"], mebibytes(float(row["device_bytes"])), with_interval(row, "kl", 4),
            f"{float(row['kl_p95']):.3f}, {float(row['kl_p99']):.3f}", f"{row['worst_text']} {float(row['worst_kl']):.4f}",
            with_interval(row, "worst_of_q8_0", 2), with_interval(row, "ppl_ratio", 3), f"{float(row['top1_ratio']):.3f}",
        )
        for row in sorted(rows, key=lambda row: (int(row["length"]), -float(row["device_bytes"])))
        if row["side"] != "full-f16"
    ]  # fmt: skip
    return markdown(head, cells)


def equal_bytes_table(folder: Path, model: str = MODEL, length: int = LENGTH) -> str:
    """Upstream's caches, and asrkf with a part of the full F16 cache's bytes: what the same bytes buy. Most bytes first."""
    of_length = (row for row in newest(folder / "judge.csv", "model", "length", "side") if (row["model"], int(row["length"])) == (model, length))
    found = sorted((row for row in of_length if row["side"].startswith(("full", "asrkf"))), key=lambda row: -float(row["device_bytes"]))
    cells = [
        (spelled_side(row), mebibytes(float(row["device_bytes"])), with_interval(row, "kl", 4), f"{100 * float(row['top1_ratio']):.1f} %")
        for row in found
    ]
    head = ("cache", "device KV + index", f"KL, texts of {length:,} tokens", "same likeliest next token")
    return "\n".join([*markdown(head, cells), *made_by(found)])


def spelled_side(row: Row) -> str:
    """asrkf 1/3 f16: "asrkf, 1/3 of the bytes, F16"; full-q8_0: "full, Q8_0"; with ranking=own that behind it."""
    policy, _, share = row["side"].partition(" ")
    of_bytes = f"{share.split()[0]} of the bytes, " if share else ""
    own = ", `ranking=own`" if "ranking=own" in row["config"] else ""
    return f"{policy.split('-')[0]}, {of_bytes}{row['type'].upper()}{own}"


def with_interval(row: Row, figure: str, digits: int) -> str:
    value, low, high = (float(row[figure + suffix]) for suffix in ("", "_low", "_high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def tasks_table(rows: list[Row]) -> list[str]:
    """Of one length: a line for each side, a column for each task that the full cache solves; and what it does not."""
    full = {row["task"]: row for row in rows if row["side"] == "full-f16"}
    counting = [task for task, row in full.items() if is_solved(row)]
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        own = {row["task"]: row for row in rows if row["side"] == side}
        first = next(iter(own.values()))
        scores = (score(own[task]) if task in own else "" for task in counting)
        lines.append((first["length"], side, mebibytes(float(first["device_bytes"])), *scores))
    unsolved = ", ".join(f"{task} ({score(full[task])})" for task in full if task not in counting)
    below = ["", f"Not solved by the full cache: {unsolved}."] if unsolved else []
    return [*markdown(("tokens", "side", "device K, V, index", *counting), lines), *below]


def is_solved(row: Row) -> bool:
    return float(row["found"]) >= SOLVED_RATIO * int(row["asked"])


def score(row: Row) -> str:
    return f"{row['found']} of {row['asked']}"


def goals_table(rows: list[Row]) -> list[str]:
    of_side = {(row["side"], int(row["length"])): row for row in rows}
    cells = [
        (str(goal.length), goal.side, goal.name, f"{goal.most:g}", f"{value:.4g}", "reached" if value <= goal.most else "missed")
        for goal in GOALS
        if (row := of_side.get((goal.side, goal.length))) and (value := float(row[goal.figure])) is not None
    ]
    return markdown(("tokens", "side", "goal", "at most", "is", ""), cells) if cells else []


def table_of_equal_bytes(_arguments: object) -> int:
    print(equal_bytes_table(results_file("judge.csv").parent))
    return 0


def table_of_judge(_arguments: object) -> int:
    print(judge_tables(results_file("judge.csv").parent))
    return 0
