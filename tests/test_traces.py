"""A run recorded as CSV and drawn; positions run-length encoded."""

from __future__ import annotations

import csv
import subprocess
import sys
from itertools import groupby

import pytest
from conftest import python
from test_windowed import tokens

from asrkf_gguf import KVError
from asrkf_gguf.cli import main
from asrkf_gguf.traces import STEP_COLUMNS, map_file, read_trace, tracing

POLICY = "asrkf,layers=0@512/1@768,calibration=off"


@pytest.fixture
def pooled(load, tiny):
    return load(tiny, n_ctx=4096, kv_policy=POLICY, n_batch=256)


# runs of positions

def test_runs_are_the_states_of_all_tokens_and_name_what_is_pinned(pooled):
    assert pooled.kv_runs() == [] and pooled.pinned() == []
    pooled.eval(tokens(300))
    pooled.pin(100, 140)
    pooled.pin(20, 30)
    assert pooled.pinned() == [(20, 30), (100, 140)]
    pooled.eval(tokens(1500))
    for group in (0, 1):
        expected = []
        for position, state in pooled.kv_tokens(group):
            is_pinned = 100 <= position < 140 or 20 <= position < 30
            expected.append((position, "frozen" if state == "frozen" else "pinned" if is_pinned else "active"))
        runs = pooled.kv_runs(group)
        assert [(position, state) for begin, end, state in runs for position in range(begin, end)] == expected
        assert [state for _, _, state in runs] == [state for state, _ in groupby(state for _, state in expected)]
        assert {state for _, _, state in runs} == {"active", "frozen", "pinned"} and (100, 140, "pinned") in runs
    pooled.unpin(0, 120)
    assert pooled.pinned() == [(120, 140)]


def test_positions_that_a_sliding_window_no_longer_has_are_a_gap_between_runs(load, tmp_path):
    from test_windowed import write_gemma3

    write_gemma3(tmp_path / "model.gguf", n_layer=8)
    llm = load(str(tmp_path / "model.gguf"), n_ctx=2048, kv_policy="asrkf,calibration=off", kv_pool=512)
    llm.eval(tokens(1200))
    for index in range(len(llm.kv_stats().groups)):
        assert sum(end - begin for begin, end, _ in llm.kv_runs(index)) == len(llm.kv_tokens(index))


# files

def test_a_trace_has_every_step_and_where_the_tokens_were_at_its_end(pooled, tmp_path):
    with tracing(pooled, tmp_path / "run.csv"):
        pooled.eval(tokens(1500))
        for token in (1, 2, 3):
            pooled.eval([token])
    trace = read_trace(tmp_path / "run.csv")
    assert sum(step["n_tokens"] for step in trace.steps) >= 1503  # and the rewalk
    assert trace.steps[-1]["pos"] == 1502 and trace.steps[-1]["frozen_cells"] == pooled.kv_stats().frozen_cells > 0
    assert trace.steps[-1]["missed_attention_ratio"] == pytest.approx(pooled.kv_stats().missed_attention_ratio, rel=1e-4)
    for group in (0, 1):
        assert [(run["begin"], run["end"], run["state"]) for run in trace.runs if run["group"] == group] == pooled.kv_runs(group)


def test_a_run_that_fails_is_recorded_as_far_as_it_came(pooled, tmp_path):
    with pytest.raises(KVError), tracing(pooled, tmp_path / "run.csv"):
        pooled.eval(tokens(4000))
        pooled.eval(tokens(200))
    assert read_trace(tmp_path / "run.csv").steps[-1]["pos"] >= 3900 and read_trace(tmp_path / "run.csv").runs


def test_upstreams_cache_has_no_trace(load, tiny, tmp_path):
    with pytest.raises(KVError, match="upstream's KV cache"), tracing(load(tiny, kv_policy="full"), tmp_path / "run.csv"):
        raise AssertionError("it began")
    assert not list(tmp_path.iterdir())


def test_run_records_and_plot_draws(smollm2, text, tmp_path, capsys):
    options = [smollm2, "-c", "2048", "--kv-pool", "512", "-t", "1", "-n", "24", "-p", text[:3600]]
    command = [sys.executable, "-m", "asrkf_gguf.cli", "run", *options, "--trace", "run.csv"]
    assert subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, check=False, timeout=120).returncode == 0
    with (tmp_path / "run.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert {"entropy", "missed_attention_ratio", "freezes"} <= set(steps[0]) and float(steps[-1]["entropy"]) > 0
    for name in ("run.png", "other.svg"):
        assert main(["plot", str(tmp_path / "run.csv"), *([] if name == "run.png" else ["-o", str(tmp_path / name)])]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        assert (tmp_path / name).stat().st_size > 5000
    drawn = (tmp_path / "other.svg").read_text()
    assert "#5b8fd6" in drawn and "#4c9f70" in drawn
    map_file(tmp_path / "run.csv").unlink()
    assert main(["plot", str(tmp_path / "run.csv")]) == 0  # the steps alone


# what cannot be

@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        ("", "is no trace of steps: asrkf run MODEL --trace"),
        ("a,b\n1,2\n", "is no trace of steps"),
        (f"{','.join(STEP_COLUMNS)}\n{'x,' * 7}1\n", "is damaged: could not convert"),
        (f"{','.join(STEP_COLUMNS)}\n1\n", "is damaged"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "run.csv").write_text(content)
    assert main(["plot", str(tmp_path / "run.csv")]) == 1
    line = capsys.readouterr().err
    assert line.startswith("asrkf plot: ") and said in line and line.count("\n") == 1


def test_without_matplotlib_the_line_says_what_to_install(tmp_path):
    (tmp_path / "run.csv").write_text(f"{','.join(STEP_COLUMNS)}\n{'1,' * 7}1\n")
    code = "import sys; sys.modules['matplotlib'] = None; from asrkf_gguf.cli import main; sys.exit(main(%r))"
    result = python(code % ["plot", str(tmp_path / "run.csv")])
    assert (result.returncode, result.stderr) == (
        1, "asrkf plot: plots need matplotlib: pip install 'asrkf-gguf[bench]' or pip install matplotlib\n",
    )  # fmt: skip


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_computed(smollm2, tmp_path):
    command = [sys.executable, "-m", "asrkf_gguf.cli", "run", smollm2, "-c", "512", "-p", "x", "--trace", "nowhere/run.csv"]
    result = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("asrkf run: [Errno 2] No such file or directory: 'nowhere/run.csv'")
