"""RoPE that is scaled, KV heads that differ from layer to layer, copies of a model, and host RAM that runs out: as upstream, with
something frozen."""

from __future__ import annotations

import pickle
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conftest import python
from kv import check_states
from make_models import write_tiny
from test_architectures import N_TOKENS, compare_with_mask, logits_after, tokens

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


def keys(llm) -> np.ndarray:
    """K of the first layer, by position: there it depends on the token and its position alone."""
    rows = [llm.kv_rows(position)[: 2 * 64 * 2] for position in range(llm.n_tokens)]
    return np.frombuffer(b"".join(rows), np.float16).reshape(len(rows), -1).astype(np.float32)


def test_with_scaled_rope_a_shifted_key_is_that_of_its_new_position(load, rope):
    path, options = rope
    llm = load(path, kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512, **options)
    llm.eval(tokens(N_TOKENS, 1))
    before = keys(llm)
    assert llm.freeze(10, 40) + llm.freeze(160, 220) == 90
    shift(llm)
    assert llm.kv_stats().frozen_cells == 90  # shifted where they are
    found = keys(llm)
    check_states(llm)
    llm.reset()
    llm.eval(tokens(N_TOKENS, 1)[:50] + tokens(N_TOKENS, 1)[150:])
    expected = keys(llm)
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-3 * largest  # F16, rounded twice
    assert np.abs(before[150:] - expected[50:]).max() > 0.1 * largest  # so it is the shift that makes them equal


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
