"""The judge: every policy and upstream's caches at equal device bytes, in texts and in tasks, made into one table. A policy has at most the
bytes of its share: those with budgets by layer use them to a percent, the others in steps of 256 cells in every layer.

Sides read the same texts, position by position, and the same prompts; so all comparisons are paired. Its parts (a side at a length, a
side in a task) are those of `quality` and `needles`, with their records: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from ..gates.file import default_file
from ..models import resolve_model
from ..tasks import TASKS
from ..texts import load_texts
from .judge_tables import is_solved, judge_tables
from .measure import Resampled
from .needles import NEEDLES, Needles
from .quality import Quality
from .records import DESCRIPTION, Table, describe, load_record, results_file
from .sides import REFERENCE, Side, parse_side

# A third, a quarter and an eighth of the F16 cache's bytes; K, V, index and gates count. K in Q8_0 and V in Q5_0, which buy most; the same in
# Q8_0, as the other policies have it.
SHARES = (("1/3", "33.3%"), ("1/4", "25%"), ("1/8", "12.5%"))
BASE = "full-q8_0"
MAIN = (
    BASE, "full-q4_0",
    *(f"asrkf {share}=asrkf,pool={pool};type=q8_0/q5_0" for share, pool in SHARES),
)  # fmt: skip
OTHERS = (
    "full-q8_0-q5_0=full;type=q8_0/q5_0", "full-q8_0-q4_0=full;type=q8_0/q4_0", "asrkf 1/3 f16=asrkf,pool=33.3%;type=f16",
    *(f"asrkf {share} q8_0=asrkf,pool={pool};type=q8_0" for share, pool in SHARES),
    *(f"asrkf {share} own=asrkf,pool={pool},ranking=own;type=q8_0/q5_0" for share, pool in SHARES),
    *(f"{policy} 1/3={policy},pool=33.3%;type=q8_0" for policy in ("kvzip", "refreekv", "window", "random", "paper")),
)
ASKED = ("full-f16", BASE, "asrkf 1/3", "asrkf 1/8")  # in every task; the other sides where questions share a prompt
JUDGED_TASKS = tuple(name for name in TASKS if name != "passkey-filler")
FIGURES = [
    "kl", "kl_low", "kl_high", "kl_p95", "kl_p99", "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high", "top1_ratio",
    "worst_text", "worst_kl", "worst_of_q8_0", "worst_of_q8_0_low", "worst_of_q8_0_high",
]  # fmt: skip
BYTES = ["device_kv_bytes", "device_index_bytes", "device_bytes", "host_kv_bytes"]
JUDGED = [*DESCRIPTION, "length", "positions", "texts", "side", "config", "type", *BYTES, *FIGURES, "run"]


@dataclass(frozen=True)
class Part:
    """What a process measures at a time: one side, in the texts of a length or in a task."""

    side: Side
    length: int
    task: str = ""

    @property
    def name(self) -> str:
        return f"{self.side.name} {self.length} {self.task or 'texts'}"

    @property
    def kind(self) -> str:
        return "tasks" if self.task else "texts"


def sides_of(model: Path, is_main_only: bool) -> list[Side]:
    """In the order of the table. Gates are trained for a model: without them there is no kvzip."""
    texts = [*MAIN, *([] if is_main_only else OTHERS)]
    if not has_gates(model):
        texts = [text for text in texts if not text.startswith("kvzip")]
    return [REFERENCE, *(parse_side(text, "") for text in texts)]


@functools.cache
def has_gates(model: Path) -> bool:
    return default_file(model).exists()


def parts_of(arguments: argparse.Namespace, tasks: list[str]) -> tuple[list[Part], list[Part]]:
    """The reference's, which all others need; and the others', what matters most first."""
    first, *more = arguments.length
    all_sides, main = sides_of(arguments.model, False), sides_of(arguments.model, True)
    reference = [Part(REFERENCE, length) for length in arguments.length] + [Part(REFERENCE, first, task) for task in tasks]
    others = [Part(side, first) for side in main[1:]]
    others += [Part(side, first, task) for task in tasks for side in all_sides[1:] if side.name in ASKED]
    others += [Part(side, first) for side in all_sides[len(main) :]]
    others += [Part(side, length) for length in more for side in main[1:]]
    others += [Part(side, first, task) for task in tasks for side in all_sides[1:] if side.name not in ASKED and TASKS[task].n_questions > 1]
    if arguments.judged_sides:
        others = [part for part in others if part.side.name in arguments.judged_sides]
    return reference, others


def measure_part(arguments: argparse.Namespace, part: Part) -> str:
    """Rows of one part, in a process of its own. The name of the part."""
    texts = load_texts(arguments.text)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # no bars beside the judge's own
        if part.task:
            Needles(asked_for(arguments, part.length, "judge_tasks.csv"), texts, [part.side], [part.task]).run()
        else:
            Quality(asked_for(arguments, part.length, "judge_texts.csv"), texts, [part.side]).run()
    return part.name


def asked_for(arguments: argparse.Namespace, length: int, file: str) -> argparse.Namespace:
    """What `quality` and `needles` would be given."""
    out = (arguments.out or results_file("judge.csv").parent) / file
    return argparse.Namespace(**{**vars(arguments), "length": [length], "out": out, "passages": 1, "chunk": 1, "gives_up": True})


def counting_tasks(arguments: argparse.Namespace, tasks: list[str]) -> list[str]:
    """Those that the full cache solves."""
    found = argparse.Namespace(**{**vars(asked_for(arguments, arguments.length[0], "judge_tasks.csv")), "again": False})  # measured just now
    rows = Needles(found, load_texts(arguments.text), [REFERENCE], tasks).rows
    return [task for (_, _, task), row in rows.items() if is_solved(row)]


def end_with_parent() -> None:
    """In each process: a judge that is killed shall not leave work behind."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_parts(arguments: argparse.Namespace, parts: Iterable[Part], bar: tqdm) -> None:
    """Each in a process, so many at once. What fails ends the run: what is done is kept."""
    pool = concurrent.futures.ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), end_with_parent)
    with pool:
        waiting = [pool.submit(measure_part, arguments, part) for part in parts]
        try:
            for done in concurrent.futures.as_completed(waiting):
                bar.set_description(f"judge: {done.result()}")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def summary(arguments: argparse.Namespace, side: Side, length: int) -> Optional[dict[str, Any]]:
    """The row of a side in all texts; None as long as a text is missing."""
    quality = Quality(asked_for(arguments, length, "judge_texts.csv"), load_texts(arguments.text), [])

    def records(side: Side) -> list[dict[str, Any]]:
        found = (load_record(quality.paths(side, length, text)[0]) for text in quality.texts)
        return [record for record in found if record]

    mine, base = records(side), records(parse_side(BASE, ""))
    if not len(mine) == len(base) == len(quality.texts):
        return None
    kl = [Resampled.of(record["kl"], i) for i, record in enumerate(mine)]
    of_q8_0 = [one.over(Resampled.of(record["kl"], i)) for i, (one, record) in enumerate(zip(kl, base, strict=True))]
    nll = [Resampled.of(record["nll"] - its["nll"], i) for i, (record, its) in enumerate(zip(mine, records(REFERENCE), strict=True))]
    positions, worst = np.concatenate([record["kl"] for record in mine]), max(range(len(kl)), key=lambda i: kl[i].value)
    intervals = {"kl": Resampled.mean(kl), "ppl_ratio": Resampled.mean(nll).exp(), "worst_of_q8_0": max(of_q8_0, key=lambda one: one.value)}
    figures = {
        **{name: one.value for name, one in intervals.items()},
        **{f"{name}_low": one.interval[0] for name, one in intervals.items()}, **{f"{name}_high": one.interval[1] for name, one in intervals.items()},
        "kl_p95": np.percentile(positions, 95), "kl_p99": np.percentile(positions, 99), "worst_kl": kl[worst].value,
        "top1_ratio": np.concatenate([record["agree"] for record in mine]).mean(),
    }  # fmt: skip
    row = mine[0]["row"]
    return {
        **{key: row[key] for key in ("date", "machine", "threads", "model", "config", "type", *BYTES)},
        "commit": "+".join(dict.fromkeys(record["row"]["commit"] for record in mine)),
        "command": describe(arguments)["command"],
        **{key: f"{value:.6g}" for key, value in figures.items()}, "worst_text": list(quality.texts)[worst], "texts": "+".join(quality.texts),
        "length": length, "positions": arguments.positions, "side": side.name,
        "run": "+".join(quality.run_of(side, length, text) for text in quality.texts),
    }  # fmt: skip


def judge(arguments: argparse.Namespace) -> int:
    known = [text.partition("=")[0] for text in (*MAIN, *OTHERS)]
    if unknown := next((name for name in arguments.judged_sides if name not in known), None):
        raise ValueError(f"--side {unknown}: the judge has {', '.join(known)}")
    tasks = arguments.task or list(JUDGED_TASKS)
    folder = arguments.out or results_file("judge.csv").parent
    for model in [resolve_model(name) for name in arguments.models or ["smollm2"]]:
        of_model = argparse.Namespace(**{**vars(arguments), "model": model})
        if not has_gates(model):
            print(f"{model.name} has no gates, so kvzip is not judged on it: asrkf gates train makes them", file=sys.stderr)
        reference, others = ([part for part in parts if arguments.only in ("", part.kind)] for parts in parts_of(of_model, tasks))
        for file, columns in (("judge_texts.csv", Quality.columns()), ("judge_tasks.csv", NEEDLES)):
            Table(folder / file, columns)  # before processes write to them
        with tqdm(total=len(reference) + len(others), unit="part", desc="judge", disable=None) as bar:
            run_parts(of_model, reference, bar)
            counting = counting_tasks(of_model, tasks)
            others = [part for part in others if not part.task or part.task in counting]
            bar.total = len(reference) + len(others)
            run_parts(of_model, others, bar)
        table = Table(folder / "judge.csv", JUDGED, arguments.again)
        for length in arguments.length:
            for side in sides_of(model, is_main_only=length != arguments.length[0]):
                if row := summary(of_model, side, length):
                    table.add(row)
    print(judge_tables(folder))
    print(f"rows in {folder}: judge.csv, judge_texts.csv, judge_tasks.csv")
    return 0
