"""The figures of a comparison, made of what the run saw. Units are in the names; `to_dict()` is what --json writes."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from ..bench.measure import Predictions, summarise
from ..bench.records import describe
from ..bench.sides import Side
from ..stats import types_of
from .run import AtDepth, Run, Visit

VERSION = 1  # of the format


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    least: float
    most: float
    rounds: int


def spread(values: Iterable[float]) -> Spread:
    """ValueError without values."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Memory:
    """Bytes, as the backend has them."""

    device_kv_bytes: int
    device_index_bytes: int
    device_staging_bytes: int
    device_compute_bytes: int
    host_kv_bytes: int
    """Frozen tokens at the end of the longest passage; or upstream's cache, if it is in host RAM beside a GPU."""

    @property
    def cache_bytes(self) -> int:
        """What grows with the context: K, V and index on the device."""
        return self.device_kv_bytes + self.device_index_bytes


@dataclass(frozen=True)
class Figures:
    """One side at one depth. Speed is a spread over rounds; predictions are those of all rounds together."""

    depth: int
    read_tokens_per_second: Spread
    """Of the stretch of the prompt that ends here."""
    decode_tokens_per_second: Spread
    read_ratio: Spread
    """To the full F16 cache in the same round; more is faster."""
    decode_ratio: Spread
    positions: int
    ppl: float
    ppl_ratio: float
    ppl_ratio_se: float
    kl_mean: float
    kl_se: float
    kl_p99: float
    top1_ratio: float
    missed_attention_ratio: Optional[float]
    """Mean of all scorings while tokens were decoded; None where nothing is scored."""
    frozen_cells: int


@dataclass(frozen=True)
class SideReport:
    name: str
    config: str
    type_k: str
    type_v: str
    pool_cells: int
    pool_choice: str
    refused: str
    """Why there is no such context here; all else is empty then."""
    memory: Optional[Memory]
    load_seconds: Optional[Spread]
    depths: tuple[Figures, ...]
    """In order; fewer if the run was stopped."""
    facts_found: int
    facts_asked: int

    @property
    def types(self) -> str:
        """Of K and V: "q8_0", "q8_0/q5_0"."""
        return types_of(self)

    def at(self, depth: int) -> Optional[Figures]:
        """None if this side was not read so far."""
        return next((figures for figures in self.depths if figures.depth == depth), None)


@dataclass(frozen=True)
class Report:
    format: str
    version: int
    is_complete: bool
    stopped: str
    """What ended the run early; its figures are those of the rounds that there were."""
    about: dict[str, Any]
    """Date, version or commit, machine, threads, model and command."""
    n_ctx: int
    rounds: int
    positions: int
    text: str
    text_sha256: str
    weights_bytes: dict[str, int]
    """By device."""
    reference: str
    sides: tuple[SideReport, ...]
    notes: tuple[str, ...]

    @property
    def depths(self) -> list[int]:
        """That any side was read to."""
        return sorted({figures.depth for side in self.sides for figures in side.depths})

    def at_end(self) -> dict[str, tuple[SideReport, Figures]]:
        """By name the sides that were read as far as any other, with their figures there: these can be compared."""
        end = max(self.depths, default=0)
        return {side.name: (side, figures) for side in self.sides if (figures := side.at(end))}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


SAME_PLACE = "no GPU has part in this: K and V are in host RAM, and --no-kv-offload would change nothing"


def make_report(run: Run) -> Report:
    arguments, opened = run.arguments, run.opened[run.reference.name]
    about = {**describe(arguments), "threads": opened.threads}
    digest = hashlib.sha256(run.text.encode()).hexdigest()
    return Report(
        "asrkf-compare", VERSION, not run.stopped, run.stopped, about, arguments.n_ctx, arguments.rounds, arguments.positions, run.text_name, digest,
        {row.name: row.weights_bytes for row in opened.devices}, run.reference.name, tuple(_side(run, side) for side in run.sides),
        () if run.has_card else (SAME_PLACE,),
    )  # fmt: skip


def _side(run: Run, side: Side) -> SideReport:
    if side.name in run.refused:
        return SideReport(side.name, "", "", "", 0, "", run.refused[side.name], None, None, (), 0, 0)
    opened, visits = run.opened[side.name], [visit for visit in run.visits if visit.side == side]
    ends = [visit.depths[-1].stats for visit in visits if visit.depths]
    stats = max(ends, key=lambda stats: stats.host_kv_bytes, default=opened.stats)
    memory = Memory(**{name: getattr(stats, name) for name in Memory.__dataclass_fields__})
    if side.in_host_ram:
        memory = dataclasses.replace(memory, device_kv_bytes=0, host_kv_bytes=memory.device_kv_bytes)
    answers = [answer for visit in visits for answer in visit.answers]
    depths = sorted({at.depth for visit in visits for at in visit.depths})
    return SideReport(
        side.name, opened.config, stats.type_k, stats.type_v, stats.pool_cells, stats.pool_choice, "", memory,
        spread(visit.load_seconds for visit in visits) if visits else None, tuple(_figures(run, visits, depth) for depth in depths),
        sum(found for *_, found in answers), len(answers),
    )  # fmt: skip


def _at(visits: Iterable[Visit], depth: int) -> dict[int, AtDepth]:
    """By round."""
    return {visit.round: at for visit in visits for at in visit.depths if at.depth == depth}


def _figures(run: Run, visits: list[Visit], depth: int) -> Figures:
    mine = _at(visits, depth)
    full = {round_: at for round_, at in _at((visit for visit in run.visits if visit.side == run.reference), depth).items() if round_ in mine}
    read, full_read = ([at.read_tokens / at.read_seconds for at in ats.values()] for ats in (mine, full))
    decoded, full_decoded = ([1 / float(np.mean(at.predictions.seconds)) for at in ats.values()] for ats in (mine, full))
    found, expected = (Predictions.joined(at.predictions for at in ats.values()) for ats in (mine, full))
    missed = [ratio for at in mine.values() for ratio in at.missed_attention_ratios]
    return Figures(
        depth, spread(read), spread(decoded),
        spread(a / b for a, b in zip(read, full_read, strict=True)), spread(a / b for a, b in zip(decoded, full_decoded, strict=True)),
        len(found.nll), **summarise(expected.nll, found.nll, found.kl, found.agree),
        missed_attention_ratio=statistics.fmean(missed) if missed else None, frozen_cells=next(iter(mine.values())).stats.frozen_cells,
    )  # fmt: skip
