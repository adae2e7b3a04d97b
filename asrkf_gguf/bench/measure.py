"""Read passages of a text as if they were generated, and compare every prediction with the reference's."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import llama_cpp
import numpy as np

from ..divergence import kl_divergence, log_softmax
from ..llama import Llama
from .sides import read_counters

RESAMPLES, BLOCK_POSITIONS = 2000, 16


class Bar(Protocol):
    """A progress bar, such as tqdm's."""

    def update(self, n: float) -> Any: ...


def standard_error(values: np.ndarray) -> float:
    """Of the mean; positions are taken as independent."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


@functools.cache
def _draws(n: int, seed: int) -> np.ndarray:
    """[RESAMPLES, n or less]: positions of a circular block bootstrap (Politis and Romano 1992): neighbours hang together."""
    size = min(BLOCK_POSITIONS, n)
    begins = np.random.default_rng([n, seed]).integers(0, n, (RESAMPLES, n // size, 1))
    return (begins + np.arange(size)).reshape(RESAMPLES, -1) % n


@dataclass(frozen=True)
class Resampled:
    """A figure, and the same of resamples. Figures of the same positions and seed are paired: their draws are the same."""

    value: float
    draws: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, seed: int = 0) -> Resampled:
        """The mean over positions."""
        return cls(float(values.mean()), values[_draws(len(values), seed)].mean(axis=1))

    @classmethod
    def mean(cls, parts: Sequence[Resampled]) -> Resampled:
        return cls(sum(part.value for part in parts) / len(parts), np.mean([part.draws for part in parts], axis=0))

    def exp(self) -> Resampled:
        return Resampled(math.exp(self.value), np.exp(self.draws))

    def over(self, other: Resampled) -> Resampled:
        return Resampled(self.value / other.value, self.draws / other.draws)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the resamples lie in it."""
        low, high = np.percentile(self.draws, (2.5, 97.5))
        return float(low), float(high)


def summarise(reference_nll: np.ndarray, nll: np.ndarray, kl: np.ndarray, agree: np.ndarray) -> dict[str, float]:
    """Pooled over positions. The error of the ratio is paired: delta method on the mean difference of the same positions."""
    difference = nll - reference_nll
    ratio = math.exp(difference.mean())
    return {
        "ppl": math.exp(nll.mean()), "ppl_ratio": ratio, "ppl_ratio_se": ratio * standard_error(difference),
        "kl_mean": float(kl.mean()), "kl_se": standard_error(kl), "kl_p99": float(np.percentile(kl, 99)), "top1_ratio": float(agree.mean()),
    }  # fmt: skip


def feed(llm: Llama, tokens: Sequence[int], bar: Optional[Bar] = None) -> None:
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


def cut_passages(llm: Llama, name: str, text: str, length: int, n: int, may_overlap: bool = False) -> list[list[int]]:
    """n passages of length + 1 tokens (the last is only predicted), one after the other from 20 % of the text on; closer to each other
    if they may overlap and the text is too short otherwise."""
    begin = len(text) // 5
    begin = max(begin, text.find("\n\n", begin) + 2)
    tokens = llm.tokenize(text[begin : begin + n * (length + 1) * 10].encode(), add_bos=True)
    head = tokens[:1] if tokens[:1] == [llm.token_bos()] else []
    body, size = tokens[len(head) :], length + 1 - len(head)
    needed = size + n if may_overlap else n * size
    if len(body) < needed:
        raise ValueError(f"text {name}: {len(body)} tokens after its first fifth, {n} passages of {length} need {needed}: a longer text, or less")
    stride = min(size, (len(body) - size) // max(1, n - 1))
    return [head + body[i * stride : i * stride + size] for i in range(n)]


def fit(llm: Llama, tokens: list[int], n_read: int) -> list[int]:
    """The newest tokens, with the first one if it is the model's beginning-of-sequence token: what a short context holds."""
    head = tokens[:1] if tokens[0] == llm.token_bos() else []
    return tokens if len(tokens) <= n_read else head + tokens[len(tokens) - n_read + len(head) :]


@dataclass
class Predictions:
    """What was predicted, position by position: loss, KL to the reference, agreement on the likeliest token; and the seconds it took."""

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    seconds: np.ndarray
    """A token, of each step."""

    @classmethod
    def joined(cls, parts: Iterable[Predictions]) -> Predictions:
        """One after the other."""
        columns = zip(*((part.nll, part.kl, part.agree, part.seconds) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


def decode(
    llm: Llama, tokens: list[int], begin: int, end: int, chunk: int = 1,
    reference: Optional[np.ndarray] = None, keep: Optional[np.ndarray] = None, bar: Optional[Bar] = None,
) -> Predictions:  # fmt: skip
    """Read tokens[begin:end] in chunks as if they were generated; what lies before is in the cache.

    After each chunk the prediction of the next token is compared with its row of `reference` (log probabilities) and
    written to `keep`, if given.
    """
    rows: list[tuple[float, float, bool]] = []
    seconds: list[float] = []
    for at in range(begin, end, chunk):
        began = time.perf_counter()
        llm.eval(tokens[at : at + chunk])
        logits = last_logits(llm)
        seconds.append((time.perf_counter() - began) / chunk)
        found = log_softmax(logits)
        expected = found
        if reference is not None:  # normalised again: it is stored in half precision, and KL must not be negative
            expected = log_softmax(np.asarray(reference[len(rows)], dtype=np.float64))
        if keep is not None:
            keep[len(rows)] = found
        rows.append((-float(found[tokens[at + chunk]]), kl_divergence(expected, found), bool(expected.argmax() == found.argmax())))
        if bar is not None:
            bar.update(chunk)
    nll, kl, agree = (np.array(column) for column in zip(*rows, strict=True))
    return Predictions(nll, kl, agree, np.array(seconds))


def rows_of(table: Optional[np.ndarray], begin: int, end: int) -> Optional[np.ndarray]:
    """A part of a reference, or of what is kept; a view."""
    return None if table is None else table[begin:end]


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
    reference: Optional[np.ndarray] = None, keep: Optional[np.ndarray] = None, bar: Optional[Bar] = None,
) -> Measured:  # fmt: skip
    """Read all but `positions` tokens of each passage at once, then decode() the rest; reference and keep have the rows of all passages.

    The seconds are a by-product of one run, not a benchmark: scripts/bench speed is one.
    """
    parts: list[Predictions] = []
    moved_bytes, restored_bytes, rewalks = 0, 0, 0
    for i, tokens in enumerate(passages):
        clear(llm)
        n_prefill = len(tokens) - 1 - positions
        feed(llm, tokens[:n_prefill], bar)
        before = read_counters(llm)
        rows = i * (positions // chunk), (i + 1) * (positions // chunk)
        parts.append(decode(llm, tokens, n_prefill, len(tokens) - 1, chunk, rows_of(reference, *rows), rows_of(keep, *rows), bar))
        after = read_counters(llm)
        to_host, to_device = (after[key] - before[key] for key in ("moved_to_host_bytes", "moved_to_device_bytes"))
        moved_bytes, restored_bytes, rewalks = moved_bytes + to_host + to_device, restored_bytes + to_device, rewalks + after["rewalks_total"]
    found = Predictions.joined(parts)
    return Measured(found.nll, found.kl, found.agree, float(np.median(found.seconds)), moved_bytes, restored_bytes, rewalks, after)
