"""Helpers of the model tests: tokens, logits, and what must hold after any step."""

from __future__ import annotations

import ctypes
from collections import Counter

import llama_cpp
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


def placement_noise(model_path: str, tokens: list[int], following: list[int]) -> float:
    """The model's own noise floor: largest difference of any logit between two runs of upstream's cache on the same
    tokens that differ only in the cells they lie in (a second sequence holds the low cells while the first half is read).
    """
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    half = len(tokens) // 2

    def run(rotated: bool) -> list[np.ndarray]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 2048
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = 2
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(model, params)

        def decode(part: list[int], sequence: int, position: int) -> None:
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = i == len(part) - 1
            assert llama_cpp.llama_decode(context, batch) == 0
            llama_cpp.llama_batch_free(batch)

        if rotated:
            decode([*tokens, *tokens][: len(tokens) + 100], 1, 0)
        decode(tokens[:half], 0, 0)
        if rotated:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 1, 0, -1)
        decode(tokens[half:], 0, half)
        logits = []
        for i, token in enumerate(following):
            pointer = ctypes.cast(llama_cpp.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float))
            logits.append(np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy())
            decode([token], 0, len(tokens) + i)
        llama_cpp.llama_free(context)
        return logits

    noise = max(float(np.abs(a - b).max()) for a, b in zip(run(False), run(True), strict=True))
    llama_cpp.llama_model_free(model)
    return noise
