"""A GPU backend as the second device: weights, pool, index and scoring in its memory. Run by scripts/test_gpu, which builds for it.

Mesa's software device is slow (about ten tokens a second of a real model), so the models here are tiny.
"""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from devices import check_that_it_freezes_as_on_the_cpu, rows
from make_models import write_nearly, write_tiny
from test_architectures import logits_after, tokens

DEVICE = os.environ.get("ASRKF_TEST_GPU")  # the backend's name, such as vulkan
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU backend is tested here: run scripts/test_gpu")


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_tiny(tmp_path / "model.gguf", n_layer=4)
    return str(tmp_path / "model.gguf")


def test_the_build_sees_the_device(load, model, capfd):
    llm = load(model, n_gpu_layers=-1, verbose=True, kv_policy="full", n_ctx=512)
    llm.eval(tokens(8, 1))
    log = capfd.readouterr().err
    assert llama_cpp.llama_supports_gpu_offload() and f"using device {DEVICE}".lower() in log.lower()
    assert "offloaded 5/5 layers to GPU" in log


@pytest.mark.parametrize("n_gpu_layers", [-1, 3])
def test_it_freezes_as_the_cpu_does(model, tmp_path: Path, n_gpu_layers: int):
    write_nearly(tmp_path / "nearly.gguf", Path(model))
    check_that_it_freezes_as_on_the_cpu(model, is_staged=True, nearly_path=str(tmp_path / "nearly.gguf"), n_gpu_layers=n_gpu_layers)


def test_from_one_state_the_next_decisions_are_the_cpus(load, model):
    options = {"kv_policy": "asrkf,layers=0-1@512/2-3@768,window=64,index=f16", "n_ctx": 2048}
    device, cpu = load(model, n_gpu_layers=-1, **options), load(model, n_gpu_layers=0, **options)
    cpu.eval(tokens(1200, 1))
    state, before = cpu.save_state(), frozen(cpu)
    for llm in (device, cpu):
        llm.load_state(state)
        logits_after(llm, 17)  # two decisions
    assert all(len(a ^ b) > 20 for a, b in zip(before, frozen(cpu), strict=True))  # tokens that went or came back
    agree = min(len((a ^ c) & (b ^ c)) / len((a ^ c) | (b ^ c)) for a, b, c in zip(frozen(device), frozen(cpu), before, strict=True))
    print(f"of the tokens that changed places here or on the CPU, {agree:.3f} did in both")
    assert agree > 0.9


def frozen(llm) -> list[set[int]]:
    """Positions of the frozen tokens, by layer group."""
    return [{p for p, state in llm.kv_tokens(i) if state == "frozen"} for i in range(len(llm.kv_stats().groups))]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_logits_with_a_pool_that_holds_everything_are_those_without_a_policy(load, model, kind: str):
    stored = getattr(llama_cpp, f"GGML_TYPE_{kind}")
    options = {"n_gpu_layers": -1, "n_ctx": 1024, "type_k": stored, "type_v": stored}
    found = []
    for policy, pool in (("full", None), ("asrkf", 1024)):
        llm = load(model, kv_policy=policy, kv_pool=pool, **options)
        llm.eval(tokens(300, 1))
        found.append(logits_after(llm, 12))
        llm.close()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("n_gpu_layers", [-1, 3])
def test_an_nvidia_card_scores_by_our_kernels_and_other_devices_by_graphs(load, model, n_gpu_layers: int):
    llm = load(model, n_gpu_layers=n_gpu_layers, kv_policy="asrkf,pool=512,layers=shared,window=64,score_layers=0-3", n_ctx=2048)
    llm.eval(tokens(900, 1))
    stats = llm.kv_stats()
    on_a_card = "cuda" if n_gpu_layers < 0 else "cuda+graph"  # layers that stay on the CPU score there
    assert stats.scoring_backend == (on_a_card if DEVICE.lower().startswith("cuda") else "graph")
    assert stats.scoring_steps_total > 0 and 0 < stats.missed_attention_ratio < stats.missed_attention_worst_ratio <= 1.0001


def test_a_state_goes_from_the_device_to_the_cpu_and_back(load, model):
    options = {"kv_policy": "asrkf,layers=0-1@512/2-3@768,window=64", "n_ctx": 2048}
    device, cpu = load(model, n_gpu_layers=-1, **options), load(model, n_gpu_layers=0, **options)
    device.eval(tokens(900, 1))
    before = rows(device, 900)
    cpu.load_state(device.save_state())
    assert rows(cpu, 900) == before
    device.reset()
    device.load_state(cpu.save_state())
    assert rows(device, 900) == before
    expected = logits_after(cpu)
    assert np.abs(logits_after(device) - expected).max() < 0.02 * np.abs(expected).max()

