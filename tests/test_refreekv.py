"""ReFreeKV's rule in the engine: against NumPy on attention from llama.cpp's own graph, and what can be seen and set."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest
from attention_oracle import attention_rows, losses
from kv import check_states, greedy, tokens_of
from make_models import write_tiny
from test_windowed import write_gemma3

from asrkf_gguf import FreezeConfig

SINKS = 4
# Two graphs, with flash attention and without, round otherwise: a cut may lie where NumPy's loss is so far from the tolerance. With
# quantised keys llama.cpp's product rounds the query to 8 bits, too; ours does not.
LOSS_TOLERANCE = {"F16": 1e-3, "Q8_0": 5e-3, "Q4_0": 5e-3}


def cut_of(states: list[tuple[int, str]]) -> int:
    """How many of the oldest tokens behind the sinks are frozen; no others are."""
    frozen = [position for position, state in states if state == "frozen"]
    assert frozen == list(range(SINKS, SINKS + len(frozen)))
    return len(frozen)


def check_cuts(llm, rows: list[np.ndarray], tolerance: float, type_k: str = "F16") -> list[int]:
    """Each layer is cut where NumPy cuts it; the cuts."""
    cuts = [cut_of(llm.kv_tokens(layer)) for layer in range(len(rows))]
    exact = 0
    for row, cut in zip(rows, cuts, strict=True):
        loss = losses(row, np.arange(SINKS, row.shape[1] - 1))
        expected = int(np.searchsorted(loss, tolerance, "right")) - 1
        assert loss[cut] <= tolerance + LOSS_TOLERANCE[type_k]
        assert cut + 1 == len(loss) or loss[cut + 1] >= tolerance - LOSS_TOLERANCE[type_k]
        exact += cut == expected
    assert type_k != "F16" or exact >= len(rows) // 2  # of which most are the same to the token
    return cuts


def some_tokens(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


@pytest.mark.parametrize(
    ("type_k", "n_rows"), [("F16", 1), ("F16", 6), ("Q8_0", 1), ("Q4_0", 1)], ids=["f16", "f16, six rows", "q8_0", "q4_0"]
)
@pytest.mark.parametrize("tolerance", [0.005, 0.05, 0.2])
def test_every_layer_of_a_small_model_is_cut_where_numpy_cuts_it(load, tmp_path, type_k, n_rows, tolerance):
    path = tmp_path / "model.gguf"
    write_tiny(path, n_layer=4)
    kind, tokens = getattr(llama_cpp, f"GGML_TYPE_{type_k}"), some_tokens(500)
    llm = load(str(path), n_ctx=512, type_k=kind, kv_policy=f"refreekv,tolerance={tolerance},rows={n_rows}", kv_pool=512)
    llm.eval(tokens)
    cuts = check_cuts(llm, attention_rows(path, tokens, n_rows, kind), tolerance, type_k)
    assert max(cuts) > 0 and (tolerance < 0.2 or min(cuts) > 0)
    stats = llm.kv_stats()
    assert [group.kept_ratio for group in stats.groups] == pytest.approx([1 - cut / 500 for cut in cuts])
    assert stats.kept_ratio == pytest.approx(1 - sum(cuts) / 4 / 500)
    assert stats.cuts_total == 1 and stats.enough_cells == (512 if min(cuts) + 256 < 508 else 256)


def test_every_layer_of_a_real_model_is_cut_where_numpy_cuts_it(load, smollm2, text):
    llm = load(smollm2, n_ctx=256, kv_policy="refreekv", kv_pool=256)
    tokens = tokens_of(llm, text, 240)
    llm.eval(tokens)
    cuts = check_cuts(llm, attention_rows(smollm2, tokens), 0.01)
    assert len(cuts) == 30 and len(set(cuts)) > 10  # layers differ
    check_states(llm)
    assert llm.kv_stats().kept_ratio < 0.9


def test_layers_that_share_a_set_are_cut_by_the_mean_of_their_losses(load, tmp_path):
    path, tokens = tmp_path / "model.gguf", some_tokens(400)
    write_tiny(path, n_layer=4)
    llm = load(str(path), n_ctx=512, kv_policy="refreekv,tolerance=0.1,layers=shared", kv_pool=512)
    llm.eval(tokens)
    mean = np.mean([losses(row, np.arange(SINKS, 399)) for row in attention_rows(path, tokens)], 0)
    cut = cut_of(llm.kv_tokens(0))
    assert cut > 0 and mean[cut] <= 0.1 + LOSS_TOLERANCE["F16"] and mean[cut + 1] >= 0.1 - LOSS_TOLERANCE["F16"]


def test_layers_with_a_sliding_window_are_not_cut_and_the_others_are(load, tmp_path):
    path, tokens = write_gemma3(tmp_path / "model.gguf", 12), some_tokens(400)
    llm = load(path, n_ctx=512, kv_policy="refreekv,tolerance=0.2", kv_pool=512)
    llm.eval(tokens)
    check_cuts(llm, attention_rows(path, tokens, layers=(5, 11)), 0.2)  # groups 0 and 1
    *plain, windowed = llm.kv_stats().groups
    assert len(plain) == 2 and all(0 < group.kept_ratio < 1 for group in plain) and windowed.kept_ratio == -1


def test_a_larger_tolerance_keeps_less_and_a_small_pool_bounds_it(load, smollm2, text):
    kept = []
    for tolerance in (0, 0.01, 0.1):
        llm = load(smollm2, n_ctx=256, kv_policy=f"refreekv,tolerance={tolerance}", kv_pool=256)
        llm.eval(tokens_of(llm, text, 200))
        kept.append(llm.kv_stats().kept_ratio)
        llm.close()
    assert 0.98 < kept[0] >= kept[1] > kept[2]
    llm = load(smollm2, n_ctx=512, kv_policy="refreekv,tolerance=0", kv_pool=256)
    llm.eval(tokens_of(llm, text, 400))
    stats = llm.kv_stats()
    assert stats.enough_cells == 512 and all(group.kept_ratio < 0.63 < 0.98 < group.wanted_ratio for group in stats.groups)
    check_states(llm)
    greedy(llm, [5], 20)
    check_states(llm)
    assert llm.kv_stats().cuts_total == 1


def test_a_prompt_that_python_reads_in_pieces_is_cut_once_and_repeat_cuts_again(load, tiny):
    llm = load(tiny, n_ctx=1024, n_batch=128, kv_policy="refreekv,repeat=10", kv_pool=1024)
    llm.eval(some_tokens(513))  # the last piece is one token
    assert llm.kv_stats().cuts_total == 1
    greedy(llm, [5], 20)
    assert llm.kv_stats().cuts_total == 3


def test_in_the_order_of_relevance_more_may_go(load, smollm2, text):
    kept = {}
    for order in ("position", "relevance"):
        llm = load(smollm2, n_ctx=256, kv_policy=f"refreekv,tolerance=0.02,order={order}", kv_pool=256)
        llm.eval(tokens_of(llm, text, 200))
        stats = llm.kv_stats()
        kept[order] = stats.kept_ratio
        assert (stats.scoring_steps_total > 0) == (order == "relevance")
    assert kept["relevance"] < kept["position"]


def test_recall_brings_back_what_a_cut_froze(load, smollm2, text):
    llm = load(smollm2, n_ctx=256, kv_policy="refreekv,tolerance=0.1,recall=exact", kv_pool=256)
    llm.eval(tokens_of(llm, text, 200))
    greedy(llm, [5], 24)
    stats = llm.kv_stats()
    assert stats.restores_total["recall"] > 0 and stats.frozen_cells > 0
    check_states(llm)


def test_a_state_keeps_the_cut(load, tiny):
    llm = load(tiny, n_ctx=1024, kv_policy="refreekv,tolerance=0.3", kv_pool=1024)
    llm.eval(some_tokens(600))
    cuts = [cut_of(llm.kv_tokens(layer)) for layer in range(2)]
    state = llm.save_state()
    greedy(llm, [5], 12)
    llm.load_state(state)
    llm.eval([7])
    assert min(cuts) > 0 and [cut_of(llm.kv_tokens(layer)) for layer in range(2)] == cuts


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"tolerance": 1.5}, "tolerance=1.5 is out of range [0, 1]"),
        ({"rows": 0}, "rows=0 is out of range [1, 64]"),
        ({"order": "age"}, "known: position, relevance"),
        ({"repeat": -1}, "repeat=-1 is out of range"),
        ({"order": "relevance", "score": "recency"}, "order=relevance goes by scores"),
    ],
)
def test_bad_values_are_refused(values: dict, part: str):
    with pytest.raises(ValueError) as error:
        FreezeConfig("refreekv", **values)
    assert part in str(error.value)
