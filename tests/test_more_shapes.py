"""RoPE that is scaled, KV heads that differ from layer to layer, copies of a model, and host RAM that runs out: as upstream, with
something frozen."""

from __future__ import annotations

import pickle
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import python
from kv import check_states
from make_models import write_tiny
from test_architectures import ARCHITECTURES, LAYER_NORM, N_TOKENS, QK_NORMS, compare_with_mask, logits_after, tokens

from asrkf_gguf import KVError
from asrkf_gguf.models import kv_bytes_per_token

YARN = {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN, "rope_freq_scale": 0.25, "yarn_orig_ctx": 128}
FACTORS = {"rope_freqs.weight": np.geomspace(1.0, 8.0, 32)}  # LLaMA 3.1 has such a tensor
ROPES = {"plain": ({}, {}), "yarn": ({}, YARN), "factors": ({"values": FACTORS}, {})}


@pytest.fixture(params=ROPES)
def rope(request, tmp_path: Path):
    """A tiny model's path, and the options that it is loaded with."""
    model, options = ROPES[request.param]
    write_tiny(tmp_path / "model.gguf", **model)
    return str(tmp_path / "model.gguf"), options


def test_scaled_rope_counts(load, tmp_path: Path):
    """Else the tests below would all be of the plain one."""
    found = []
    for name, (model, options) in ROPES.items():
        write_tiny(tmp_path / f"{name}.gguf", **model)
        llm = load(str(tmp_path / f"{name}.gguf"), kv_policy="full", n_ctx=512, **options)
        llm.eval(tokens(N_TOKENS, 1))
        found.append(logits_after(llm, 1))
    for other in found[1:]:
        assert np.abs(other - found[0]).max() > 1e-3 * np.abs(found[0]).max()


def test_with_scaled_rope_a_frozen_token_is_one_that_attention_does_not_see(load, rope):
    path, options = rope
    compare_with_mask(load, path, **options)


def shift(llm) -> None:
    """Positions 50 to 149 are gone, what follows moves down by 100."""
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, 50, 150)
    llama_cpp.llama_memory_seq_add(memory, 0, 150, -1, -100)
    llm.n_tokens = N_TOKENS - 100


def keys(llm, kind: str = "F16", n_elements: int = 2 * 64, layer: int = 0) -> np.ndarray:
    """K of a layer as it is stored, by position. In the first layer it depends on the token and its position alone."""
    type_k = gguf.GGMLQuantizationType[kind]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[type_k]
    n_bytes = n_elements // block_elements * block_bytes
    rows = [llm.kv_rows(position)[2 * layer * n_bytes :][:n_bytes] for position in range(llm.n_tokens)]  # K and V of each layer
    return gguf.quants.dequantize(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1), type_k)


def test_with_scaled_rope_a_shifted_key_is_that_of_its_new_position(load, rope):
    path, options = rope
    check_shifted_keys(load, path, "F16", **options)


SHAPES = {
    "heads of 64": {}, "heads of 96": {"n_embd": 384},
    "a quarter turned": {**ARCHITECTURES["stablelm"], "arch": "stablelm"} | {"metadata": {**LAYER_NORM, "rope.dimension_count": 16}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shifted_key_of_each_type_is_that_of_its_new_position(load, tmp_path: Path, shape, kind):
    """Quantised keys are stored rotated where a head's size allows that; upstream's shift then dies, or turns the wrong elements."""
    write_tiny(tmp_path / "model.gguf", **SHAPES[shape])
    type_kv = int(gguf.GGMLQuantizationType[kind])
    check_shifted_keys(load, str(tmp_path / "model.gguf"), kind, type_k=type_kv, type_v=type_kv)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shifted_key_of_each_architecture_is_that_of_its_new_position(load, tmp_path: Path, arch):
    write_tiny(tmp_path / "model.gguf", arch=arch, **ARCHITECTURES[arch])
    check_shifted_keys(load, str(tmp_path / "model.gguf"), "F16")


def test_layers_whose_keys_have_no_position_keep_them(load, tmp_path: Path):
    """Every fourth of SmolLM3; upstream's shift turns them, too."""
    write_tiny(tmp_path / "model.gguf", arch="smollm3", n_layer=4)
    llm = load(str(tmp_path / "model.gguf"), kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512)
    llm.eval(tokens(N_TOKENS, 1))
    before = [keys(llm, layer=il) for il in range(4)]
    assert llm.freeze(160, 220) == 60
    shift(llm)
    after = [keys(llm, layer=il) for il in range(4)]
    for il in range(4):
        turned = np.abs(after[il][50:] - before[il][150:]).max()
        assert turned == 0 if il == 3 else turned > 0.1 * np.abs(before[il]).max(), il


def test_keys_with_more_than_a_rotation_behind_them_are_not_shifted(load, tmp_path: Path):
    write_tiny(tmp_path / "model.gguf", arch="hunyuan-dense", extra=QK_NORMS)
    llm = load(str(tmp_path / "model.gguf"), kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512)
    llm.eval(tokens(N_TOKENS, 1))
    assert not llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(llm._ctx.ctx))
    shift(llm)
    with pytest.raises(KVError, match=r"could not be shifted.*a way that a shift cannot follow"):
        llm.eval([1])


def check_shifted_keys(load, path: str, kind: str, **options) -> None:
    llm = load(path, kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512, **options)
    n_elements = llm.n_embd() // 2
    llm.eval(tokens(N_TOKENS, 1))
    before = keys(llm, kind, n_elements)
    assert llm.freeze(10, 40) + llm.freeze(160, 220) == 90
    shift(llm)
    assert llm.kv_stats().frozen_cells == 90  # shifted where they are
    found = keys(llm, kind, n_elements)
    check_states(llm)
    llm.reset()
    llm.eval(tokens(N_TOKENS, 1)[:50] + tokens(N_TOKENS, 1)[150:])
    expected = keys(llm, kind, n_elements)
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < {"F16": 2e-3, "BF16": 0.01, "Q8_0": 0.02, "Q4_0": 0.2}[kind] * largest  # rounded twice
    assert np.abs(before[150:] - expected[50:]).max() > 0.35 * largest  # so it is the shift that makes them equal


@pytest.mark.parametrize("rope", ["plain", "factors"], indirect=True)
def test_frozen_tokens_are_shifted_as_upstreams_are(load, rope):
    """Not with YaRN: there upstream's shift makes keys larger (docs/support.md)."""
    path, options = rope
    full = load(path, kv_policy="full", n_ctx=512, **options)
    full.eval(tokens(N_TOKENS, 1))
    shift(full)
    expected = logits_after(full)
    llm = load(path, kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512, **options)
    llm.eval(tokens(N_TOKENS, 1))
    assert llm.freeze(10, 40) + llm.freeze(160, 220) == 90
    shift(llm)
    assert llm.restore(0, -1) == 90
    found = logits_after(llm)
    check_states(llm)
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_with_scaled_rope_a_state_goes_on_as_if_nothing_had_been(load, rope):
    path, options = rope
    llm = load(path, kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512, **options)
    llm.eval(tokens(N_TOKENS, 1))
    llm.freeze(20, 90)
    state = llm.save_state()
    expected = logits_after(llm)
    llm.reset()
    llm.eval(tokens(100, 3))
    llm.load_state(state)
    assert llm.kv_stats().tokens == N_TOKENS
    found = logits_after(llm)
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.fixture(params=[[2, 1, 2], [1, 2, 4]], ids=str)
def heads(request, tmp_path: Path):
    """A model of `deci`, whose layers differ in KV heads, and how many each has."""
    write_tiny(tmp_path / "model.gguf", arch="deci", n_layer=3, n_head_kv=request.param)
    return str(tmp_path / "model.gguf"), request.param


def test_a_layer_without_attention_is_refused_by_its_number(load, tmp_path: Path):
    write_tiny(tmp_path / "model.gguf", arch="deci", n_layer=3, n_head_kv=[2, 0, 1])
    load(str(tmp_path / "model.gguf"), kv_policy="full", n_ctx=512).eval(tokens(20, 1))
    with pytest.raises(ValueError, match="layer 1 of this deci has no attention"):
        load(str(tmp_path / "model.gguf"), kv_policy="asrkf", kv_pool=512)


def test_with_heads_that_differ_a_frozen_token_is_one_that_attention_does_not_see(load, heads):
    path, _ = heads
    compare_with_mask(load, path)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_with_heads_that_differ_the_backend_allocates_what_is_said_of_a_token(load, heads, kind: str):
    path, by_layer = heads
    token_bytes = kv_bytes_per_token(Path(path), kind)
    assert kind != "F16" or token_bytes == sum(by_layer) * 64 * 2 * 2  # heads of 64, K and V
    stored = llama_cpp.GGML_TYPE_F16 if kind == "F16" else llama_cpp.GGML_TYPE_Q8_0
    full = load(path, kv_policy="full", n_ctx=1024, type_k=stored, type_v=stored)
    assert full.kv_stats().device_kv_bytes == 1024 * token_bytes
    llm = load(path, kv_policy="asrkf,layers=each", kv_pool=512, n_ctx=1024, type_k=stored, type_v=stored)
    llm.eval(tokens(900, 1))
    assert np.isfinite(logits_after(llm, 20)).all()
    check_states(llm)
    groups = llm.kv_stats().groups
    assert len(groups) == len(by_layer) and all(group.frozen_cells >= 920 - group.pool_cells for group in groups)
    assert sum(group.token_bytes for group in groups) == token_bytes
    assert llm.kv_stats().device_kv_bytes == sum(group.pool_cells * group.token_bytes for group in groups) <= 512 * token_bytes
    rows = [llm.kv_rows(position, group) for position in (300, 900) for group in range(len(groups))]
    assert [len(row) for row in rows] == 2 * [group.token_bytes for group in groups] and all(map(any, rows))


def test_a_pickle_is_made_again_with_its_policy_and_pool(load, tiny):
    llm = load(tiny, n_ctx=1024, kv_policy="asrkf,window=64", kv_pool=512)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert type(copy) is type(llm) and copy.kv_config() == llm.kv_config()
        for each in (llm, copy):
            each.eval(tokens(800, 1))
        np.testing.assert_array_equal(logits_after(llm), logits_after(copy))
        assert copy.kv_stats().frozen_cells == llm.kv_stats().frozen_cells > 200
    finally:
        copy.close()


OUT_OF_MEMORY = """
import resource, sys
from asrkf_gguf import KVError, Llama
options = {"n_ctx": 65536, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
llm = Llama(sys.argv[1], kv_policy="asrkf,layers=shared,window=64", kv_pool=512, **options)
llm.eval([1] * 2000)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (6 << 20), resource.RLIM_INFINITY))
try:
    for _ in range(250):
        llm.eval([1] * 256)
    print("never refused")
except KVError as error:
    print("refused:", error)
before = llm.kv_stats()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert before.active_cells + before.frozen_cells == before.tokens
llm.n_tokens = before.tokens
llm.eval([1] * 6000)  # more than an arena of the host store holds
after = llm.kv_stats()
print(after.tokens - before.tokens, before.tokens > 2000, before.host_kv_bytes < after.host_kv_bytes)
"""


def test_when_host_ram_runs_out_the_step_is_refused_and_nothing_is_lost(tiny):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc/self/statm: the process's size is not known")
    result = python(OUT_OF_MEMORY.replace("sys.argv[1]", repr(tiny)))
    assert result.returncode == 0, result.stderr[-2000:]
    refused, went_on = result.stdout.splitlines()
    assert refused.startswith("refused: ") and "memory" in refused
    assert went_on == "6000 True True"
