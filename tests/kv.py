"""Helpers of the model tests: tokens, logits, and what must hold after any step."""

from __future__ import annotations

from collections import Counter

import numpy as np


def tokens_of(llm, text: str, n: int) -> list[int]:
    """The first n tokens of text."""
    tokens = llm.tokenize(text[: n * 8].encode(), add_bos=True)
    assert len(tokens) >= n
    return tokens[:n]


def last_logits(llm) -> np.ndarray:
    """Logits of the last evaluated token, a copy, F32 [n_vocab]."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


def greedy(llm, tokens: list[int], n: int) -> tuple[list[int], list[np.ndarray]]:
    """Evaluate tokens, then n greedy steps; the tokens chosen and the logits of each step."""
    llm.eval(tokens)
    chosen, logits = [], []
    for _ in range(n):
        logits.append(last_logits(llm))
        chosen.append(int(logits[-1].argmax()))
        llm.eval([chosen[-1]])
    return chosen, logits


def check_states(llm) -> None:
    """Contract 5 and the bound: every token in one state, in every group; positions without holes; protected ones active."""
    stats = llm.kv_stats()
    config = llm.kv_config()
    for index, group in enumerate(stats.groups):
        states = llm.kv_tokens(index)
        assert [position for position, _ in states] == list(range(stats.tokens))
        count = Counter(state for _, state in states)
        assert count["active"] + count["active-copied"] == group.active_cells
        assert count["active-copied"] == group.active_copied_cells
        assert count["frozen"] == group.frozen_cells
        assert group.active_cells + group.frozen_cells == stats.tokens
        assert group.active_cells <= group.pool_cells
        protected = set(range(min(int(config.sinks), stats.tokens))) | set(range(max(0, stats.tokens - group.window), stats.tokens))
        assert all(states[position][1] != "frozen" for position in protected)
