"""The run: sides in turns, round by round. One context exists at a time, so each side has the whole device to itself."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ..bench.measure import Predictions, clear, decode, feed, last_logits, rows_of
from ..bench.needles import ANSWER_TOKENS, Asked, ask
from ..bench.sides import Side, config_text, open_side
from ..llama import Llama
from ..stats import DeviceMemory, KVStats, read_device_memory
from ..tasks import is_found
from .passages import Passage, cut
from .progress import Pace, Progress, Stopped, probe
from .sides import IN_HOST_RAM, QUANTISED, REFERENCE

STRIDE_TOKENS = 8  # between two looks at what attention missed


@dataclass(frozen=True)
class Opened:
    """A side's context before anything was read."""

    stats: KVStats
    config: str
    devices: list[DeviceMemory]
    threads: int


@dataclass(frozen=True)
class AtDepth:
    """A stretch of the prompt, and what was decoded at its end."""

    depth: int
    read_tokens: int
    read_seconds: float
    predictions: Predictions
    missed_attention_ratios: list[float]
    stats: KVStats


@dataclass
class Visit:
    """One side in one round; as much of it as there was time for."""

    side: Side
    round: int
    load_seconds: float
    depths: list[AtDepth] = field(default_factory=list)
    answers: list[tuple[str, str, bool]] = field(default_factory=list)
    """What was hidden, what was said, and whether that is right."""


class Run:
    """What is measured, and after that what was seen."""

    def __init__(self, arguments: argparse.Namespace, pooled: list[Side], text_name: str, text: str) -> None:
        self.arguments, self.text_name, self.text = arguments, text_name, text
        self.reference, self.sides = REFERENCE, [REFERENCE, *QUANTISED, *pooled]
        self.opened: dict[str, Opened] = {}
        self.refused: dict[str, str] = {}
        self.visits: list[Visit] = []
        self.stopped = ""
        """Why it ended early."""
        self._passages: list[Passage] = []
        self._expected: dict[int, np.ndarray] = {}  # the reference's log probabilities of this round, by depth

    @property
    def has_card(self) -> bool:
        """Is there a device whose memory is not the host's?"""
        return any(not row.is_host for opened in self.opened.values() for row in opened.devices)

    # before the rounds

    def prepare(self) -> Pace:
        """Open each side once: a model is calibrated, the weights are in the page cache, and it is known who does not fit.

        Cuts the text, and says how fast the reference is. ValueError if there is no reference.
        """
        pace = self._try(self.reference)
        if pace is None or self.has_card:  # without a GPU K and V are in host RAM already
            self.sides.insert(1, IN_HOST_RAM)
            of_ram = self._try(IN_HOST_RAM)
            if pace is None:
                self.reference, pace = IN_HOST_RAM, of_ram
        if pace is None:
            tokens = self.arguments.n_ctx
            raise ValueError(f"the full F16 cache of {tokens} tokens, with which all is compared, cannot be had: {self.refused[REFERENCE.name]}")
        for side in self.sides:
            if side.name not in self.opened and side.name not in self.refused:
                self._try(side)
        return pace

    def _try(self, side: Side) -> Optional[Pace]:
        try:
            with self._open(side) as (llm, seconds):
                self.opened[side.name] = Opened(llm.kv_stats(), config_text(llm), read_device_memory(llm.ctx), llm.n_threads)
                if self._passages:
                    return None
                arguments = self.arguments
                self._passages = cut(llm, self.text_name, self.text, arguments.n_ctx, arguments.positions, arguments.rounds)
                return probe(llm, self._passages[0].tokens, seconds)
        except RefusedError as error:
            self.refused[side.name] = " ".join(str(error).split())
            return None

    @contextlib.contextmanager
    def _open(self, side: Side) -> Iterator[tuple[Llama, float]]:
        """A context of this side, and the seconds that it took. RefusedError if there is no such context; a model that cannot be loaded is
        an error of its own."""
        began = time.perf_counter()
        try:
            llm = open_side(side, self.arguments.n_ctx, self.arguments)
        except (ValueError, RuntimeError) as error:
            is_nameless = "create llama_context" in str(error)  # llama.cpp's reason is in its log only
            if not (is_nameless or side.is_pooled):
                raise
            raise RefusedError("no memory for it, or the device does not take this type" if is_nameless else error) from error
        with contextlib.closing(llm):
            yield llm, time.perf_counter() - began

    # the rounds

    def seconds(self, pace: Pace) -> float:
        """What all rounds may take."""
        return len(self.opened) * sum(pace.of_visit(passage, self.arguments.positions) for passage in self._passages)

    def go(self, progress: Progress) -> None:
        """All rounds, or as much as there is until something stops it: then `stopped` says what."""
        try:
            with progress.running():
                for round_, passage in enumerate(self._passages):
                    self._expected = {}
                    for side in self._turns():
                        progress.visit(f"round {round_ + 1} of {len(self._passages)}, {side.name}")
                        self._visit(side, round_, passage, progress)
        except (Stopped, RefusedError, RuntimeError) as error:
            self.stopped = str(error)

    def _turns(self) -> list[Side]:
        """The reference first: the others' predictions are compared with its."""
        return sorted((side for side in self.sides if side.name in self.opened), key=lambda side: side != self.reference)

    def _visit(self, side: Side, round_: int, passage: Passage, progress: Progress) -> None:
        with self._open(side) as (llm, seconds):
            self.visits.append(visit := Visit(side, round_, seconds))
            clear(llm)
            at = 0
            for depth in passage.depths:
                visit.depths.append(self._at_depth(llm, side, passage, at, depth, progress))
                at = depth + self.arguments.positions
            for question, answer in passage.questions:
                output = ask(llm, Asked(passage.tokens[:-1], [], question, (answer,), ANSWER_TOKENS))
                visit.answers.append((answer, output, is_found(answer, output)))
                progress.spent(progress.pace.of_questions(passage) / len(passage.questions))

    def _at_depth(self, llm: Llama, side: Side, passage: Passage, at: int, depth: int, progress: Progress) -> AtDepth:
        progress.decoding(False)
        began = time.perf_counter()
        feed(llm, passage.tokens[at:depth], progress)
        last_logits(llm)  # waits until they are computed
        read_seconds = time.perf_counter() - began
        progress.decoding(True)
        end, keep, expected = depth + self.arguments.positions, None, self._expected.get(depth)
        if side == self.reference:
            keep, expected = np.empty((end - depth, llm.n_vocab()), np.float16), None
        parts, missed = [], []
        for begin in range(depth, end, STRIDE_TOKENS):
            until = min(begin + STRIDE_TOKENS, end)
            rows = begin - depth, until - depth
            parts.append(decode(llm, passage.tokens, begin, until, 1, rows_of(expected, *rows), rows_of(keep, *rows), progress))
            stats = llm.kv_stats()
            if stats.device_index_bytes and stats.missed_attention_ratio >= 0:  # tokens are scored, and have been
                missed.append(stats.missed_attention_ratio)
        if keep is not None:
            self._expected[depth] = keep
        return AtDepth(depth, depth - at, read_seconds, Predictions.joined(parts), missed, stats)


class RefusedError(ValueError):
    """A context that cannot be had here."""
