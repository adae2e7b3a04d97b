"""The judge: intervals by hand, tasks that the full cache cannot solve, and one run of all of it at toy size."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import python
from make_models import write_random_gates

from asrkf_gguf import _native
from asrkf_gguf.bench import judge, judge_tables, measure, needles, sides
from asrkf_gguf.bench.measure import Resampled
from asrkf_gguf.bench.records import Table
from asrkf_gguf.family import loaded_model


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# intervals

def test_an_interval_is_about_as_wide_as_the_standard_error_says_for_independent_positions():
    values = np.random.default_rng(3).exponential(1.0, 4096)
    figure = Resampled.of(values)
    low, high = figure.interval
    assert figure.value == pytest.approx(values.mean()) and low < figure.value < high
    assert high - low == pytest.approx(2 * 1.96 * measure.standard_error(values), rel=0.15)


def test_neighbours_that_hang_together_make_an_interval_wider():
    runs = np.repeat(np.random.default_rng(4).exponential(1.0, 256), 16)
    low, high = Resampled.of(runs).interval
    assert high - low > 2.5 * 2 * 1.96 * measure.standard_error(runs)


def test_figures_of_the_same_positions_are_paired():
    noise = np.random.default_rng(5).exponential(1.0, 512)
    twice = Resampled.of(2 * noise).over(Resampled.of(noise))
    assert twice.value == pytest.approx(2) and twice.interval == pytest.approx((2, 2))
    apart = Resampled.of(2 * noise, seed=1).over(Resampled.of(noise, seed=2))
    assert apart.interval[1] - apart.interval[0] > 0.1


def test_a_mean_over_texts_is_of_their_values_and_draws():
    both = Resampled.mean([Resampled.of(np.full(32, 1.0)), Resampled.of(np.full(32, 3.0), 1)])
    assert both.value == 2 and both.interval == (2, 2)
    assert both.exp().value == pytest.approx(np.exp(2))


# sides, parts and tables

def test_the_same_bytes_are_asked_for_of_every_policy():
    asked = [side for side in (sides.parse_side(text, "") for text in (*judge.MAIN, *judge.OTHERS)) if side.is_pooled]
    assert {side.pool for side in asked} == {"33.3%", "25%", "12.5%"}
    assert {side.name for side in asked} >= {goal.side for goal in judge_tables.GOALS}
    assert {side.policy for side in asked} >= {"asrkf", "kvzip", "refreekv", "window", "random", "paper"}


def test_all_sides_are_judged_at_the_first_length_and_the_main_ones_at_all(monkeypatch):
    monkeypatch.setattr(judge, "has_gates", lambda model: False)
    arguments = argparse.Namespace(model=Path("model.gguf"), length=[4096, 2048], judged_sides=[])
    reference, others = judge.parts_of(arguments, ["five-facts", "niah-single"])
    assert {part.name for part in reference} == {f"full-f16 {what}" for what in ("4096 texts", "2048 texts", "4096 five-facts", "4096 niah-single")}
    names = [part.name for part in others]
    assert len(names) == len(set(names)) and not any("kvzip" in name for name in names)
    assert "window 1/3 4096 texts" in names and "window 1/3 2048 texts" not in names and "asrkf 1/8 2048 texts" in names
    assert "window 1/3 4096 five-facts" in names and "window 1/3 4096 niah-single" not in names  # whose prompts are not shared
    arguments.judged_sides = ["asrkf 1/8", "random 1/3"]
    chosen = judge.parts_of(arguments, ["five-facts"])[1]
    assert {part.name for part in chosen} == {"asrkf 1/8 4096 texts", "asrkf 1/8 2048 texts", "random 1/3 4096 texts", "asrkf 1/8 4096 five-facts",
                                              "random 1/3 4096 five-facts"}  # fmt: skip


def row(**values):
    return {"model": "m", "length": "4096", "side": "asrkf 1/3", "worst_of_q8_0": "1.2", "worst_kl": ".1", "ppl_ratio": "1.03", **values}


def test_goals_say_what_was_reached_and_what_was_missed():
    lines = judge_tables.goals_table([row(), row(side="asrkf 1/4", worst_of_q8_0="1.81")])
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["reached", "missed", "missed", "missed"]
    assert judge_tables.goals_table([row(length="1024")]) == []


def test_tasks_that_only_the_full_cache_was_asked_are_named_below_the_table():
    def asked(side, task, found):
        return {"length": "4096", "side": side, "task": task, "found": found, "asked": "30", "device_bytes": "1048576"}

    scores = {("full-f16", "niah-single"): "29", ("asrkf 1/3", "niah-single"): "28", ("full-f16", "early-fact"): "3"}
    lines = judge_tables.tasks_table([asked(side, task, found) for (side, task), found in scores.items()])
    assert lines[0] == "| tokens | side | device K, V, index | niah-single |"
    assert lines[3] == "| 4096 | asrkf 1/3 | 1.0 MiB | 28 of 30 |"
    assert lines[-1] == "Not solved by the full cache: early-fact (3 of 30)."


def test_the_table_of_equal_bytes_has_upstreams_caches_and_asrkf_at_one_length(tmp_path):
    def judged(side: str, kind: str, mib: int, kl: str, length: int = 4096) -> dict[str, object]:
        given = {"side": side, "type": kind, "device_bytes": mib << 20, "kl": kl, "length": length, "run": f"{side} {length}"}
        fixed = {"model": judge_tables.MODEL, "kl_low": "0.001", "kl_high": "0.1", "top1_ratio": "0.9", "commit": "abc"}
        fixed["command"] = "scripts/bench judge"
        return {**dict.fromkeys(judge.JUDGED, ""), **fixed, **given}

    table = Table(tmp_path / "judge.csv", judge.JUDGED)
    for made in (
        judged("full-q4_0", "q4_0", 25, "0.05"), judged("full-q8_0-q4_0", "q8_0/q4_0", 36, "0.01"), judged("asrkf 1/3 f16", "f16", 28, "0.02"),
        judged("window 1/3", "q8_0", 30, "0.04"), judged("full-f16", "f16", 90, "0"), judged("full-f16", "f16", 180, "0", 8192),
    ):  # fmt: skip
        table.add(made)
    lines = judge_tables.equal_bytes_table(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| full, F16", "| full, Q8_0/Q4_0", "| asrkf, 1/3 of the bytes, F16", "| full, Q4_0"]
    assert lines[4] == "| asrkf, 1/3 of the bytes, F16 | 28.0 MiB | 0.0200 (0.0010 to 0.1000) | 90.0 % |"
    assert lines[-1] == "    scripts/bench judge"


# a run

@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """Of rows and records, with random gates of the model in it."""
    place = tmp_path_factory.mktemp("judge")
    (place / "gates").mkdir()
    with loaded_model(small, vocab_only=False) as model:
        name = f"{_native.fingerprint(model)}.asrkf-gates.gguf"
    write_random_gates(place / "gates" / name, small, range(8), n_embd=128)
    return place


COMMAND = [
    "bench", "judge", "--text", "technical=topics", "--length", "4096", "--positions", "16", "--task", "niah-single", "--needles", "3", "--jobs", "2",
    "--threads", "1",
]  # fmt: skip


def run_judge(small: str, folder: Path) -> str:
    command = [*COMMAND, "--model", small, "--out", str(folder)]
    done = python(f"from asrkf_gguf.cli import main; raise SystemExit(main({command}))", ASRKF_CACHE=str(folder), ASRKF_GATES=str(folder / "gates"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_command_judges_all_sides_and_goes_on_where_it_stopped(small, folder):
    printed = run_judge(small, folder)
    judged = rows_of(folder / "judge.csv")
    by_side = {row["side"]: row for row in judged}
    main = ["full-f16", *(side.partition("=")[0] for side in judge.MAIN)]
    others = [side.partition("=")[0] for side in judge.OTHERS]
    assert set(by_side) == {*main, *others}
    full = int(by_side["full-f16"]["device_bytes"])
    for side, row in by_side.items():
        share = {"1/3": 0.334, "1/4": 0.25, "1/8": 0.125}.get(side.partition(" ")[2].split(" ")[0])
        if share:
            assert share * full - 256 * full / 4096 < int(row["device_bytes"]) <= share * full, side  # but for a unit of cells in every layer
            assert float(row["kl"]) > 0 and float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"])
            assert row["commit"] and row["texts"] == row["worst_text"] == "technical"
    assert float(by_side["full-q8_0"]["worst_of_q8_0"]) == 1 and float(by_side["full-f16"]["kl"]) < 1e-5
    # random weights find nothing, so no other side was asked
    tasks = rows_of(folder / "judge_tasks.csv")
    assert {(row["side"], row["task"]) for row in tasks} == {("full-f16", "niah-single")}
    assert "Not solved by the full cache: niah-single (0 of 2)." in printed
    files = {path: path.read_bytes() for path in folder.glob("*.csv")}
    assert run_judge(small, folder) == printed
    assert {path: path.read_bytes() for path in folder.glob("*.csv")} == files


def test_a_judge_that_is_killed_leaves_no_process_behind(small, tmp_path):
    code = f"from asrkf_gguf.cli import main; main({[*COMMAND, '--model', small, '--out', str(tmp_path)]})"
    environment = {**os.environ, "ASRKF_CACHE": str(tmp_path), "ASRKF_GATES": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not any("spawn_main" in " ".join(child.cmdline()) for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
        children = psutil.Process(parent.pid).children(recursive=True)
    time.sleep(3)  # they load the library
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert gone and not alive


def test_the_full_cache_gives_a_task_up_that_it_cannot_solve_any_more(small, load, text, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(needles, "ask", lambda llm, asked, bar: read.append(asked) or "nothing")
    given = {"out": tmp_path / "rows.csv", "again": False, "threads": 1, "model": Path(small), "length": [1024], "n_gpu_layers": 0}
    arguments = argparse.Namespace(**given, positions=16, needles=9, gives_up=True)
    run = needles.Needles(arguments, {"technical": text}, [sides.REFERENCE], ["niah-single"])
    run.run()
    (found,) = run.rows.values()
    assert (found["found"], found["asked"]) == ("0", 4) and len(read) == 4  # 5 of 9 are less than two thirds
    other = needles.Needles(argparse.Namespace(**given, positions=16, needles=9), {"technical": text}, [sides.REFERENCE], ["niah-single"])
    assert not other.rows  # its run is another one
