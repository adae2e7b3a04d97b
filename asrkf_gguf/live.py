"""What the page at /kv shows of a served model: where its tokens are, and figures over time.

A model computes in one thread, and its cache may be read there only. So pictures are taken there, between two steps, and only while
somebody looks; who asks in between gets the newest.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Optional

from ._native import KVError
from .llama import Llama

LEAST_SECONDS = 0.25
"""Between two pictures."""
LOOKS_FOR_SECONDS = 10.0
"""After the last request somebody still looks."""
MOST_SAMPLES = 1200
"""Of the figures over time: the oldest go."""


class Live:
    """Pictures of one model. take() is called where it computes, look() where it is asked for, perhaps in another thread."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._began = time.monotonic()
        self._taken = self._looked = float("-inf")
        self._samples: deque[dict[str, Any]] = deque(maxlen=MOST_SAMPLES)
        self._picture: dict[str, Any] = {}

    def look(self) -> dict[str, Any]:
        """The newest picture, and the figures since somebody looks; {} before the first."""
        self._looked = time.monotonic()
        return self._picture

    def take(self, at_least_seconds: float = LEAST_SECONDS) -> None:
        """A new picture, if somebody looks and the last one is not that young."""
        now = time.monotonic()
        if now - self._taken < at_least_seconds or now - self._looked > LOOKS_FOR_SECONDS:
            return
        self._taken = now
        stats = self._llm.kv_stats()
        self._samples.append(
            {
                "seconds": round(now - self._began, 2),
                "tokens": stats.tokens,
                "active_cells": stats.active_cells,
                "frozen_cells": stats.frozen_cells,
                "missed_attention_ratio": stats.missed_attention_ratio if stats.missed_attention_ratio >= 0 else None,
                "entropy": self._entropy(),
                "host_kv_bytes": stats.host_kv_bytes,
            }
        )
        groups = [
            {"n_layers": group.n_layers, "pool_cells": group.pool_cells, "sliding_window": group.sliding_window, "runs": self._llm.kv_runs(index)}
            for index, group in enumerate(stats.groups)
        ]
        sizes = {name: getattr(stats, name) for name in stats.__dataclass_fields__ if name.endswith("_bytes")}
        self._picture = {
            "policy": stats.policy, "n_ctx": self._llm.n_ctx(), "pool_cells": stats.pool_cells, "tokens": stats.tokens,
            "groups": groups, "bytes": sizes, "samples": list(self._samples),
        }  # fmt: skip

    def _entropy(self) -> Optional[float]:
        """Of the newest output, in nats; None where there is none yet."""
        try:
            return self._llm.output_entropy().entropy
        except (ValueError, KVError):
            return None
