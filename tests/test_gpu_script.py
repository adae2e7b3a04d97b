"""scripts/gpu where no card is: it says so, prints its plan, and measures on a CPU what it would measure on a card."""

from __future__ import annotations

import argparse
import csv
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments: str, tools: Path) -> subprocess.CompletedProcess[str]:
    """With no other programs than those of a folder."""
    environment = {**os.environ, "PATH": str(tools)}
    return subprocess.run([sys.executable, str(ROOT / "scripts/gpu"), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def gpu():
    loader = importlib.machinery.SourceFileLoader("gpu", str(ROOT / "scripts" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu", loader))
    sys.modules["gpu"] = module  # dataclasses look their module up
    loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def test_without_a_card_it_says_so_in_one_line_and_runs_nothing(tmp_path):
    for arguments in ((), ("build",), ("measure-f16-4096",)):
        done = script(*arguments, tools=tmp_path)
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.startswith("scripts/gpu: no NVIDIA card") and done.stderr.count("\n") == 1


def test_a_dry_run_prints_every_step_for_the_card_that_is_there(tmp_path):
    done = script("--dry-run", tools=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("no card here")
    names = [line.split(":")[0] for line in done.stdout.splitlines()[1:]]
    assert names[:5] == ["build", "build-upstream", "native", "models", "model"] and len(names) == 5 + 2 * 6
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA Imagined, 12.0, 580.1"\n')
    smi.chmod(0o755)
    done = script("--dry-run", "build", tools=tmp_path)
    assert done.stdout.splitlines()[0] == "card: NVIDIA Imagined, compute capability 120, driver 580.1"
    assert "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=120" in done.stdout and done.stdout.count("\n") == 2
    assert script("--dry-run", "bild", tools=tmp_path).returncode == 2


def test_measuring_gives_a_row_for_each_side_and_figure(gpu, tiny, upstream_libraries, tmp_path):
    if not (upstream_libraries / "llama-bench").exists():
        pytest.skip("the unpatched build has no llama-bench: scripts/build_upstream makes it")
    options = argparse.Namespace(model=Path(tiny), policy="asrkf,pool=512", rounds=1, n_gpu_layers=0, out=tmp_path / "gpu.csv")
    gpu.measure(options, gpu.Card("a CPU", "0", "none"), "q8_0", 900)
    options.policy = "asrkf,pool=100000"  # more than a context has: refused
    with pytest.raises(gpu.StepError, match="ours ran in no round"):
        gpu.measure(options, gpu.Card("a CPU", "0", "none"), "q8_0", 900)
    rows = list(csv.DictReader(options.out.open()))
    assert list(rows[0]) == gpu.COLUMNS
    assert {(row["side"], row["metric"]) for row in rows} == {
        (side, metric) for side in ("ours", "upstream") for metric in ("decode", "prefill", "first token", "device memory")
    }
    assert len(rows) == 8 and all(float(row["value"]) > 0 for row in rows if row["metric"] != "device memory")
