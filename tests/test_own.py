"""ranking=own: each layer weighs the shared ranking with its own attention to what it holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from kv import check_states, greedy, last_logits, tokens_of


def frozen_by_layers(llm) -> dict[str, np.ndarray]:
    """Of each layer group: which positions are frozen, bool [tokens]."""
    stats = llm.kv_stats()
    return {group.layers: np.array([state == "frozen" for _, state in llm.kv_tokens(group=i)]) for i, group in enumerate(stats.groups)}


def test_layers_with_equal_budgets_hold_different_tokens_in_the_same_bytes(load, smollm2, text):
    def run(ranking: str):
        llm = load(smollm2, kv_policy=f"asrkf,ranking={ranking}", kv_pool=768, n_ctx=2048)
        llm.eval(tokens_of(llm, text, 1300))
        check_states(llm)
        return llm, llm.kv_stats()

    (own, own_stats), (_, shared_stats) = run("own"), run("shared")
    assert (own_stats.ranking, shared_stats.ranking) == ("own", "shared")
    assert len(own_stats.groups) == 30 > 2 * len(shared_stats.groups)
    assert own_stats.device_kv_bytes == shared_stats.device_kv_bytes and own_stats.pool_cells == shared_stats.pool_cells
    assert 0 < own_stats.device_index_bytes - shared_stats.device_index_bytes <= 30 * 576 * 4 + 4096  # a query a layer
    largest = max(shared_stats.groups, key=lambda group: group.n_layers)
    members = [group for group in own_stats.groups if group.pool_cells == largest.pool_cells]
    assert len(members) == largest.n_layers >= 3  # which the shared ranking gives the same tokens
    frozen = frozen_by_layers(own)
    apart = [np.mean(frozen[a.layers] != frozen[b.layers]) for a, b in pairwise(members)]
    assert min(apart) > 0.02, apart


def test_a_pool_that_holds_everything_changes_nothing(load, smollm2, text):
    full = load(smollm2, kv_policy="full")
    tokens = tokens_of(full, text, 900)
    expected, logits = greedy(full, tokens, 20)
    llm = load(smollm2, kv_policy="asrkf,ranking=own", kv_pool=2048)
    chosen, same = greedy(llm, tokens, 20)
    assert chosen == expected and same[-1].tobytes() == logits[-1].tobytes()
    assert len(llm.kv_stats().groups) == 1 and llm.kv_stats().ranking == full.kv_stats().ranking == "none"


def test_a_run_repeats(load, tiny):
    runs = []
    for _ in range(2):
        llm = load(tiny, kv_policy="asrkf,ranking=own,layers=0@512/1@768", n_ctx=4096)
        tokens = np.random.default_rng(20261128).integers(0, 256, 2200).tolist()
        llm.eval(tokens[:2000])
        for token in tokens[2000:]:
            llm.eval([token])
        runs.append((last_logits(llm).tobytes(), llm.kv_tokens(), llm.kv_tokens(1)))
    assert runs[0] == runs[1] and llm.kv_stats().scoring_steps_total > 20


def test_tokens_may_be_taken_back_and_read_again(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,ranking=own,rewalk_tokens=0", kv_pool=512)
    tokens = tokens_of(llm, text, 1500)
    llm.eval(tokens)
    llm.n_tokens = 1200
    llm.eval(tokens[1200:])
    greedy(llm, tokens[:5], 20)
    assert llm.kv_stats().tokens == 1525 and llm.kv_stats().frozen_cells > 900
    check_states(llm)
