"""Where a sequence's tokens are, by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _native

NAMES = ("active", "active-copied", "frozen")  # enum asrkf_token_state
RUN_STATES = ("active", "frozen", "pinned")


def read_states(pointer: Any, group: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, ascending, and enum asrkf_token_state of sequence 0 in one layer group."""
    n = _native.ffi.new("size_t *")
    positions, states = np.empty(capacity, np.int32), np.empty(capacity, np.uint8)
    buffers = (_native.ffi.from_buffer(kind, array) for kind, array in (("int32_t[]", positions), ("uint8_t[]", states)))
    _native.check(_native.lib.asrkf_get_tokens(pointer, 0, group, *buffers, capacity, n))
    return positions[: n[0]], states[: n[0]]


def read_pinned(pointer: Any) -> list[tuple[int, int]]:
    """Ranges of positions [begin, end) of sequence 0 that are pinned, ascending."""
    n = _native.ffi.new("size_t *")
    _native.check(_native.lib.asrkf_get_pinned(pointer, 0, _native.ffi.NULL, 0, n))
    out = _native.ffi.new("int32_t[]", 2 * n[0])
    _native.check(_native.lib.asrkf_get_pinned(pointer, 0, out, n[0], n))
    return [(out[2 * i], out[2 * i + 1]) for i in range(n[0])]


def read_runs(pointer: Any, group: int, capacity: int) -> list[tuple[int, int, str]]:
    """The same in one layer group, run-length encoded: (begin, end, one of RUN_STATES), ascending."""
    positions, states = read_states(pointer, group, capacity)
    kinds = np.where(states == NAMES.index("frozen"), RUN_STATES.index("frozen"), RUN_STATES.index("active"))
    for begin, end in read_pinned(pointer):
        kinds[(positions >= begin) & (positions < end) & (kinds == RUN_STATES.index("active"))] = RUN_STATES.index("pinned")
    begins = np.flatnonzero((np.diff(kinds, prepend=-1) != 0) | (np.diff(positions, prepend=-2) != 1))
    lasts = [*(begins[1:] - 1), len(positions) - 1] if len(begins) else []
    return [(int(positions[first]), int(positions[last]) + 1, RUN_STATES[kinds[first]]) for first, last in zip(begins, lasts, strict=True)]
