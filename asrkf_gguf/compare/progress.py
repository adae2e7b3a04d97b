"""How long a run takes, the bar that shows it, and Control-C, which ends a run between two steps and not within one."""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..bench.measure import clear, decode, feed
from ..bench.needles import ANSWER_TOKENS
from ..llama import Llama
from .passages import Passage

PROBE_TOKENS, PROBE_SECONDS, PROBE_STEPS = 256, 10, 4


class Stopped(Exception):
    """Control-C, or what else ends a run early."""


@dataclass(frozen=True)
class Pace:
    """Seconds that the full cache takes, as far as a short probe can tell."""

    load_seconds: float
    token_seconds: float
    """To read a token when the cache is empty,"""
    growth_seconds: float
    """and so much more for each token that lies before it."""
    decode_ratio: float
    """A decoded token takes so many times what one of a prompt takes there."""

    def seconds(self, depth: int, n_tokens: int, decoded: bool = False) -> float:
        read = n_tokens * (self.token_seconds + self.growth_seconds * (depth + n_tokens / 2))
        return read * self.decode_ratio if decoded else read

    def of_questions(self, passage: Passage) -> float:
        depth = len(passage.tokens)
        return sum(self.seconds(depth, len(tokens)) + self.seconds(depth, ANSWER_TOKENS, decoded=True) for tokens, _ in passage.questions)

    def of_visit(self, passage: Passage, positions: int) -> float:
        """One side in one round."""
        total, at = self.load_seconds + self.of_questions(passage), 0
        for depth in passage.depths:
            total += self.seconds(at, depth - at) + self.seconds(depth, positions, decoded=True)
            at = depth + positions
        return total


def probe(llm: Llama, tokens: list[int], load_seconds: float) -> Pace:
    """Read a few batches, and decode a few tokens: seconds with a small model."""
    clear(llm)
    size = min(PROBE_TOKENS, len(tokens) // 8)
    feed(llm, tokens[:size])  # weights come into the CPU's caches
    batches: list[tuple[float, float]] = []
    began = time.perf_counter()
    for at in range(size, 4 * size, size):
        before = time.perf_counter()
        feed(llm, tokens[at : at + size])
        batches.append((at + size / 2, (time.perf_counter() - before) / size))
        if time.perf_counter() - began > PROBE_SECONDS:
            break
    growth = max(0.0, statistics.linear_regression(*zip(*batches, strict=True)).slope) if len(batches) > 1 else 0.0
    depth, seconds = batches[-1]
    token_seconds = max(0.0, seconds - growth * depth)
    at = llm.n_tokens
    steps = decode(llm, tokens, at, at + PROBE_STEPS).seconds
    return Pace(load_seconds, token_seconds, growth, statistics.median(steps) / (token_seconds + growth * at))


class Progress:
    """A bar of the seconds that a run is thought to take. Its updates, between steps, are where Control-C is heard."""

    def __init__(self, pace: Pace, seconds: float) -> None:
        self.pace, self._at, self._decodes, self._asked = pace, 0, False, False
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
        self._bar = tqdm(total=seconds, desc="compare", bar_format=shape, smoothing=0, disable=None, leave=False)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """In its with block Control-C raises Stopped at the next update; pressed again, KeyboardInterrupt at once."""

        def ask(_signal: int, _frame: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            tqdm.write("stopping after this step, with a report of what there is; Ctrl-C again: at once", file=sys.stderr)

        before = signal.signal(signal.SIGINT, ask)
        try:
            with self._bar:
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def visit(self, label: str) -> None:
        self._bar.set_description_str(label)
        self._at = 0
        self.spent(self.pace.load_seconds)

    def decoding(self, decodes: bool) -> None:
        self._decodes = decodes

    def update(self, n: float) -> None:
        """So many tokens were read, or decoded."""
        seconds = self.pace.seconds(self._at, int(n), self._decodes)
        self._at += int(n)
        self.spent(seconds)

    def spent(self, seconds: float) -> None:
        self._bar.update(seconds)
        if self._asked:
            raise Stopped("Ctrl-C")
