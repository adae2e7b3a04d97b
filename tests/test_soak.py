"""scripts/soak: a short run passes, its judgement can fail, and its rows are complete."""

from __future__ import annotations

import copy
import csv
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@pytest.fixture
def soak():
    loader = importlib.machinery.SourceFileLoader("soak", str(ROOT / "scripts" / "soak"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("soak", loader))
    loader.exec_module(module)
    return module


def tenths(soak) -> list[SimpleNamespace]:
    """Twelve tenths of a run in which nothing is wrong: 1,000 bytes a token, a pool of 512."""
    result = []
    for i in [*range(1, 11), 10, 10]:
        tokens = 512 + 3000 * i
        group = SimpleNamespace(active_cells=512, frozen_cells=tokens - 512, pool_cells=512, token_bytes=1000)
        host = (tokens - 512) * 1000 + 1000
        stats = SimpleNamespace(
            tokens=tokens, host_kv_bytes=host, frozen_cells=tokens - 512, groups=(group,), device_index_bytes=5 * MIB, device_compute_bytes=5 * MIB
        )
        result.append(SimpleNamespace(
            stats=stats, resident_bytes=100 * MIB + host + 200 * tokens, device_bytes=[MIB, 5 * MIB, 0, 5 * MIB], median_seconds=1e-3,
            frozen_bytes=(tokens - 512) * 1000, spare_bytes=soak.ARENA_BYTES + 512 * 1000,
        ))  # fmt: skip
    return result


def test_a_run_in_which_nothing_grows_is_good(soak):
    assert soak.failures(tenths(soak)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[5].device_bytes.__setitem__(0, 2 * MIB), "device bytes ("),
        (lambda t: setattr(t[5].stats, "host_kv_bytes", t[5].frozen_bytes - 1), "host bytes"),
        (lambda t: setattr(t[5].stats, "host_kv_bytes", t[5].frozen_bytes + 6 * MIB), "host bytes"),
        (lambda t: setattr(t[5].stats.groups[0], "active_cells", 513), "active and frozen"),
        (lambda t: setattr(t[5].stats, "frozen_cells", 0), "nothing was frozen"),
        (lambda t: setattr(t[9], "resident_bytes", t[9].resident_bytes + 20 * MIB), "beyond the host store"),
        (lambda t: setattr(t[11], "resident_bytes", t[11].resident_bytes + 5 * MIB), "read again"),
        (lambda t: setattr(t[9], "median_seconds", 2e-3), "median step"),
    ],
)
def test_each_kind_of_growth_is_found(soak, change, says):
    run = copy.deepcopy(tenths(soak))
    change(run)
    assert any(says in text for text in soak.failures(run))


def test_a_mean_step_that_grows_is_told_apart_from_failures(soak):
    run = tenths(soak)
    for i, tenth in enumerate(run):
        tenth.mean_seconds = 1e-3 * (1 + i / 9)
    assert soak.failures(run) == [] and run[9].stats.tokens >= soak.SLOWER_TOKENS
    assert soak.mean_grows(run)
    for tenth in run:
        tenth.mean_seconds = 1e-3
    assert not soak.mean_grows(run)


def test_a_short_run_keeps_its_bytes_and_writes_a_row(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status: resident bytes are not known")
    out = tmp_path / "soak.csv"
    command = [sys.executable, str(ROOT / "scripts/soak"), "--tokens", "3000", "--pool", "512", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(out.open())
    assert int(row["tokens"]) == 3000 and int(row["failures"]) == 0 and int(row["restores"]) > 0
    assert int(row["steps"]) > 300  # almost all of them decode one token
    assert 3000 - 512 <= int(row["frozen_cells"]) < 3000
    assert row["command"].startswith("scripts/soak ")


def test_every_row_names_commit_machine_model_command_and_config():
    with (ROOT / "results/soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "tokens", "step_seconds_median_last")), row
        assert "+changes" not in row["commit"] and row["failures"] == "0"
