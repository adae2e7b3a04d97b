"""Read passages of a text as if they were generated, and compare every prediction with the reference's."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import llama_cpp
import numpy as np
from tqdm import tqdm

from ..divergence import kl_divergence, log_softmax
from ..llama import Llama
from .sides import read_counters


def standard_error(values: np.ndarray) -> float:
    """Of the mean; positions are taken as independent."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def summarise(reference_nll: np.ndarray, nll: np.ndarray, kl: np.ndarray, agree: np.ndarray) -> dict[str, float]:
    """Pooled over positions. The error of the ratio is paired: delta method on the mean difference of the same positions."""
    difference = nll - reference_nll
    ratio = math.exp(difference.mean())
    return {
        "ppl": math.exp(nll.mean()), "ppl_ratio": ratio, "ppl_ratio_se": ratio * standard_error(difference),
        "kl_mean": float(kl.mean()), "kl_se": standard_error(kl), "kl_p99": float(np.percentile(kl, 99)), "top1_ratio": float(agree.mean()),
    }  # fmt: skip


def feed(llm: Llama, tokens: Sequence[int], bar: Optional[tqdm] = None) -> None:
    """One eval of all tokens; the bar follows its batches."""
    seen = 0

    def advance(done: int, _total: int) -> None:
        nonlocal seen
        if bar is not None:
            bar.update(done - seen)
        seen = done

    llm.progress = advance
    llm.eval(tokens)
    llm.progress = None
    advance(len(tokens), len(tokens))


def clear(llm: Llama) -> None:
    llm.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)


def last_logits(llm: Llama) -> np.ndarray:
    """Of the last token that was read; valid until the next one."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))


def cut_passages(llm: Llama, name: str, text: str, length: int, n: int) -> list[list[int]]:
    """n passages of length + 1 tokens (the last is only predicted), one after the other from 20 % of the text on."""
    begin = len(text) // 5
    begin = max(begin, text.find("\n\n", begin) + 2)
    tokens = llm.tokenize(text[begin : begin + n * (length + 1) * 10].encode(), add_bos=True)
    head = tokens[:1] if tokens[:1] == [llm.token_bos()] else []
    body, size = tokens[len(head) :], length + 1 - len(head)
    if len(body) < n * size:
        raise ValueError(f"text {name}: {len(body)} tokens after its first fifth, {n} passages of {length} need {n * size}: a longer text, or less")
    return [head + body[i * size : (i + 1) * size] for i in range(n)]


def fit(llm: Llama, tokens: list[int], n_read: int) -> list[int]:
    """The newest tokens, with the first one if it is the model's beginning-of-sequence token: what a short context holds."""
    head = tokens[:1] if tokens[0] == llm.token_bos() else []
    return tokens if len(tokens) <= n_read else head + tokens[len(tokens) - n_read + len(head) :]


@dataclass
class Measured:
    """Per-position arrays over all passages of one text, and what the cache did while they were decoded."""

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    seconds_per_token: float
    moved_bytes: int
    restored_bytes: int
    rewalks: int
    stats: dict[str, Any]


def measure(
    llm: Llama, passages: list[list[int]], positions: int, chunk: int = 1,
    reference: Optional[np.ndarray] = None, keep: Optional[np.ndarray] = None, bar: Optional[tqdm] = None,
) -> Measured:  # fmt: skip
    """Read all but `positions` tokens of each passage at once, then the rest in chunks as if generated.

    After each chunk the prediction of the next token is compared with its row of `reference` (log probabilities) and
    written to `keep`, if given. The seconds are a by-product of one run, not a benchmark: scripts/bench speed is one.
    """
    rows: list[tuple[float, float, bool]] = []
    seconds, moved_bytes, restored_bytes, rewalks = [], 0, 0, 0
    for tokens in passages:
        clear(llm)
        n_prefill = len(tokens) - 1 - positions
        feed(llm, tokens[:n_prefill], bar)
        before = read_counters(llm)
        for begin in range(n_prefill, len(tokens) - 1, chunk):
            began = time.perf_counter()
            llm.eval(tokens[begin : begin + chunk])
            logits = last_logits(llm)
            seconds.append((time.perf_counter() - began) / chunk)
            found = log_softmax(logits)
            expected = found
            if reference is not None:  # normalised again: it is stored in half precision, and KL must not be negative
                expected = log_softmax(np.asarray(reference[len(rows)], dtype=np.float64))
            if keep is not None:
                keep[len(rows)] = found
            rows.append((-float(found[tokens[begin + chunk]]), kl_divergence(expected, found), bool(expected.argmax() == found.argmax())))
            if bar is not None:
                bar.update(chunk)
        after = read_counters(llm)
        to_host, to_device = (after[key] - before[key] for key in ("moved_to_host_bytes", "moved_to_device_bytes"))
        moved_bytes, restored_bytes, rewalks = moved_bytes + to_host + to_device, restored_bytes + to_device, rewalks + after["rewalks_total"]
    nll, kl, agree = (np.array(column) for column in zip(*rows, strict=True))
    return Measured(nll, kl, agree, float(np.median(seconds)), moved_bytes, restored_bytes, rewalks, after)
