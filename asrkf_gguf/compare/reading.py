"""What a report comes to, in plain sentences: take upstream's cache where it is as good."""

from __future__ import annotations

import math
from typing import Optional

from ..stats import MIB
from .report import Figures, Report, SideReport
from .sides import QUANTISED, REFERENCE

Q8_0, Q4_0 = (side.name for side in QUANTISED)
Measured = tuple[SideReport, Figures]
EQUAL_SPEED = 0.05  # a difference of less is noise


def readings(report: Report) -> list[str]:
    """A sentence on upstream's caches, and one on each pool that was measured."""
    sides = report.at_end()
    whole = sides.get(Q8_0) or sides.get(report.reference)
    pools = [measured for name, measured in sides.items() if not name.startswith("upstream")]
    if whole is None or not pools:
        return ["Stopped before a pool could be compared with anything."]
    return [_of_upstream(report, sides.get(Q8_0)), *(_of_pool(pool, whole, sides.get(Q4_0)) for pool in pools)]


def _of_upstream(report: Report, q8_0: Optional[Measured]) -> str:
    f16 = "" if report.reference == REFERENCE.name else "The full F16 cache does not fit the device. "
    if q8_0 is None:
        return f16 + "There is no figure of the whole Q8_0 cache here."
    side, figures = q8_0
    speed = f"reads at {figures.read_ratio.median:.2f} x and decodes at {figures.decode_ratio.median:.2f} x the speed of {report.reference}"
    size = f"{_bytes(side) / MIB:.1f} MiB"
    return f"{f16}The whole Q8_0 cache fits: {size}, KL {figures.kl_mean:.4f}, {speed}. Take it where that is small and fast enough."


def _of_pool(pool: Measured, whole: Measured, q4_0: Optional[Measured]) -> str:
    (side, mine), (other_side, other) = pool, whole
    size = _bytes(side) / _bytes(other_side)
    if not mine.frozen_cells:
        beside = f"{size:.2f} x the bytes of {other_side.name}, KL {mine.kl_mean:.4f}"
        return f"{side.name}: all tokens fit it in {side.types}, so nothing was frozen; it is a full cache: {beside}."
    read = mine.read_tokens_per_second.median / other.read_tokens_per_second.median
    decoded = mine.decode_tokens_per_second.median / other.decode_tokens_per_second.median
    beside = f"{size:.2f} x the bytes, reads at {read:.2f} x and decodes at {decoded:.2f} x the speed"
    if size >= 1 and max(read, decoded) < 1 + EQUAL_SPEED and not _is_nearer(mine, other):
        return f"{side.name} gains nothing over {other_side.name} here: {beside}."
    text = f"{side.name} beside {other_side.name}: {beside}, KL {mine.kl_mean:.4f}"
    if q4_0 is not None and _bytes(side) <= _bytes(q4_0[0]):
        text += ", " + _beside_q4_0(mine, q4_0[1])
    return f"{text}."


def _beside_q4_0(mine: Figures, q4_0: Figures) -> str:
    if _is_nearer(mine, q4_0):
        return f"nearer to the full cache than {Q4_0} ({q4_0.kl_mean:.4f}) in no more bytes"
    return f"no nearer to the full cache than {Q4_0} ({q4_0.kl_mean:.4f})"


def _is_nearer(one: Figures, other: Figures) -> bool:
    """By more than twice the standard error of the difference."""
    return other.kl_mean - one.kl_mean > 2 * math.hypot(one.kl_se, other.kl_se)


def _bytes(side: SideReport) -> int:
    assert side.memory is not None  # it has figures
    return side.memory.cache_bytes
