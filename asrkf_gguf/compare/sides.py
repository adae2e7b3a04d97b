"""Which caches are compared: upstream's in three types, and a pool for each size that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..bench.sides import Side
from ..config import FreezeConfig

REFERENCE = Side("upstream f16")
IN_HOST_RAM = Side("upstream f16 in RAM", in_host_ram=True)
QUANTISED = tuple(Side(f"upstream {kind}", type=kind) for kind in ("q8_0", "q4_0"))


def pooled_sides(pools: str, policies: Sequence[str] = ("asrkf",)) -> list[Side]:
    """Of "0.25,512MiB": a part of the bytes that K and V of all tokens take in F16, or bytes; each with each of the policies, which are
    kv_policy strings. ValueError says what would work."""
    sizes = [pool_of(text) for text in filter(None, map(str.strip, pools.split(",")))]
    if not sizes:
        raise ValueError("--pools names no pool: a list such as 0.25,0.5 (parts of the full F16 cache's bytes)")
    for policy in policies:
        if (config := FreezeConfig.from_string(policy)).policy == "full" or config.pool is not None:
            raise ValueError(f"--policy {policy}: a policy that freezes, without a pool, such as asrkf,ranking=own; --pools says how large they are")
    return list(dict.fromkeys(Side(_name(size, policy), policy, size, "auto") for size in sizes for policy in policies))


def _name(size: str, policy: str) -> str:
    """What differs from asrkf as it is stands behind the size."""
    return ", ".join(filter(None, [f"pool {size}", "" if policy == "asrkf" else policy.removeprefix("asrkf,")]))


def pool_of(text: str) -> str:
    """As the engine takes it: every pool is bytes, so that sides can be compared at equal bytes."""
    remedy = f"--pools {text}: a part of the full F16 cache's bytes (0.25 or 25%), bytes (512MiB), or auto (what fits the device)"
    if re.fullmatch(r"[0-9]*\.?[0-9]+", text):
        if not 0 < float(text) <= 1:
            raise ValueError(remedy)
        return f"{100 * float(text):g}%"
    try:
        FreezeConfig(pool=text)
    except ValueError as error:
        raise ValueError(remedy) from error
    return text
