"""The model's graph keeps its shape: it is used again from step to step, and runs in as many pieces as upstream's."""

from __future__ import annotations

import ctypes
import re

import llama_cpp
import pytest
from kv import last_logits, tokens_of

N_STEPS = 300


def reused_graphs(llm) -> int:
    return llama_cpp.llama_perf_context(llm.ctx).n_reused


@pytest.mark.parametrize(
    ("policy", "type_kv"),
    [("asrkf", 8), *((p, 1) for p in ("asrkf", "asrkf,layers=shared", "asrkf,recall=mean_key", "asrkf,ranking=own", "asrkf,layers=each", "paper"))],
)
def test_all_decode_steps_but_the_first_use_the_graph_again(load, smollm2, text, policy, type_kv):
    """Also those that score, decide and move: with tokens frozen nothing about the graph changes any more."""
    llm = load(smollm2, kv_policy=policy, kv_pool=512, type_k=type_kv, type_v=type_kv)
    tokens = tokens_of(llm, text, 1100 + N_STEPS)
    llm.eval(tokens[:1100])
    llama_cpp.llama_perf_context_reset(llm.ctx)
    before = llm.kv_stats()
    for token in tokens[1100:]:
        llm.eval([token])
    after = llm.kv_stats()
    assert reused_graphs(llm) == N_STEPS - 1
    assert after.scoring_steps_total - before.scoring_steps_total >= N_STEPS // 8 - 1
    assert after.freezes_total > before.freezes_total


def test_of_a_generation_of_2000_tokens_all_but_a_hundredth_use_the_graph_again(load, tiny):
    """From a prompt that the pool holds, through the steps in which it fills."""
    llm = load(tiny, n_ctx=4096, n_threads=1, kv_policy="asrkf", kv_pool=512)
    llm.eval([5 * i % 251 for i in range(100)])
    llama_cpp.llama_perf_context_reset(llm.ctx)
    for _ in range(2000):
        llm.eval([int(last_logits(llm).argmax())])
    assert llm.kv_stats().frozen_cells > 1000
    assert reused_graphs(llm) >= 0.99 * 2000


def test_a_pool_that_fills_rebuilds_the_graph_as_upstream_does(load, smollm2, text):
    """Attention over a pool that has room must not cost more than it did: the graph grows in steps of 256 cells."""
    llm = load(smollm2, kv_policy="asrkf,layers=shared", kv_pool=768)
    llama_cpp.llama_perf_context_reset(llm.ctx)
    tokens = tokens_of(llm, text, 900)
    for token in tokens:
        llm.eval([token])
    assert llm.kv_stats().frozen_cells >= 900 - 768  # and room for the tokens to come
    assert reused_graphs(llm) == 900 - 3


@pytest.mark.parametrize("n", range(2, 9))
def test_drafts_use_the_graph_of_their_length_again(load, smollm2, text, n):
    llm = load(smollm2, kv_policy="asrkf,rewalk_tokens=0", kv_pool=512)  # several tokens with one output would be a prompt
    tokens = tokens_of(llm, text, 1100 + 20 * n)  # every group's pool is full by then
    llm.eval(tokens[:1100])
    llama_cpp.llama_perf_context_reset(llm.ctx)
    for begin in range(1100, 1100 + 20 * n, n):
        llm.eval(tokens[begin : begin + n])
    assert reused_graphs(llm) == 19


def splits_of(load, model: str, policy: str, **options) -> tuple[int, int]:
    """Pieces of the graphs that are reserved: of a long step, and of one token."""
    log: list[str] = []
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    callback = llama_cpp.llama_log_callback(lambda level, line, _: log.append(line.decode()))
    llama_cpp.llama_log_set(callback, None)
    try:
        load(model, kv_policy=policy, **options)
    finally:
        llama_cpp.llama_log_set(before, user_data)
    found = re.findall(r"splits = (\d+)(?: / (\d+))?", "".join(log))
    assert found, "llama.cpp does not log the pieces of its graphs"
    long, short = found[-1]
    return int(long), int(short or long)


@pytest.mark.parametrize("type_kv", [1, 8])
@pytest.mark.parametrize(
    "policy", ["asrkf", "asrkf,layers=shared", "asrkf,layers=each,recall=mean_key", "asrkf,score_layers=0-29", "asrkf,ranking=own"]
)
def test_the_graph_runs_in_as_many_pieces_as_upstreams(load, smollm2, policy, type_kv):
    """Each further piece is a point where a device waits for another. "full" is upstream's graph."""
    options = {"n_ctx": 1024, "type_k": type_kv, "type_v": type_kv}
    expected = splits_of(load, smollm2, "full", **options)
    assert splits_of(load, smollm2, f"{policy},pool=512", **options) == expected
