"""Sides: ways to keep the cache that the bench compares; and a context of one."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import llama_cpp

from ..config import FreezeConfig
from ..llama import Llama

CELLS = 256  # contexts are multiples of it, and pools that a side names as a part of the length
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Side:
    """One way to keep the cache: a policy without its pool, the pool (cells, part of the length, or bytes), and the cache's types."""

    name: str
    policy: str = "full"
    pool: str = ""
    type: str = "f16"
    """Of K and V; "q8_0/q4_0": of K, and of V; "auto": what the engine chooses for a pool of bytes."""
    ctx_is_pool: bool = False
    """Upstream's cache in a context of pool cells: only the text's last tokens fit."""
    in_host_ram: bool = False
    """Upstream's cache beside the weights of a GPU, in host RAM (llama.cpp's --no-kv-offload)."""

    @property
    def is_pooled(self) -> bool:
        return self.policy.split(",")[0] != "full"

    def cells(self, length: int) -> Union[int, str, None]:
        """The pool in cells for texts of `length` tokens; a size in bytes as it is; None without a pool."""
        if not self.pool or self.pool.isdigit():
            return int(self.pool) if self.pool else None
        try:
            part = float(self.pool)
        except ValueError:
            return self.pool
        if not 0 < part <= 1:
            raise ValueError(f"side {self.name}: pool={self.pool} is neither cells (1024) nor a part of the length (0 to 1): try pool=0.33")
        return max(CELLS, round(part * length / CELLS) * CELLS)

    def n_ctx(self, length: int) -> int:
        return self.cells(length) if self.ctx_is_pool else math.ceil(length / CELLS) * CELLS  # type: ignore[return-value]
REFERENCE = Side("full-f16")


def default_sides(pool: str) -> dict[str, Side]:
    sides = [REFERENCE, Side("full-q8_0", type="q8_0"), Side("full-q4_0", type="q4_0"), Side("n_ctx=pool", pool=pool, ctx_is_pool=True)]
    sides += [Side(policy, policy, pool) for policy in ("window", "random", "flag-all", "paper", "asrkf")]
    return {side.name: side for side in [*sides, Side("asrkf-q8_0", "asrkf", pool, "q8_0")]}


def parse_side(text: str, pool: str) -> Side:
    """A default side by its name, or NAME=POLICY[;type=q8_0][;ctx=pool], POLICY being a kv_policy string with its pool."""
    defaults = default_sides(pool)
    if text in defaults:
        return defaults[text]
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise ValueError(f"--side {text}: expected NAME=POLICY[;type=q8_0][;ctx=pool] or one of {', '.join(defaults)}")
    policy, *options = rest.split(";")
    values = dict(option.partition("=")[::2] for option in options)
    unknown = set(values) - {"type", "ctx"}
    if unknown or values.get("ctx", "pool") != "pool":
        raise ValueError(f"--side {text}: after ';' come type=... and ctx=pool, nothing else")
    pairs = policy.split(",")
    pools = [pair.partition("=")[2] for pair in pairs if pair.startswith("pool=")]
    policy = ",".join(pair for pair in pairs if not pair.startswith("pool="))
    side = Side(name, policy, "".join(pools[-1:]), values.get("type", "f16"), "ctx" in values)
    FreezeConfig.from_string(side.policy)  # refuses unknown keys and values
    cache_types(side)
    if side.ctx_is_pool and (side.is_pooled or not isinstance(side.cells(CELLS), int)):
        raise ValueError(f"--side {text}: ctx=pool is upstream's cache with few cells: full,pool=0.33;ctx=pool")
    if side.is_pooled and not side.pool and "@" not in side.policy:
        raise ValueError(f"--side {text}: {side.policy} needs a pool: add ,pool=0.33 (part of the length) or ,pool=1024 (cells)")
    return side


def chosen_sides(arguments: argparse.Namespace) -> list[Side]:
    """The reference first, then what was asked for; names are unique."""
    asked = [parse_side(text, arguments.pool) for text in arguments.side] or list(default_sides(arguments.pool).values())
    sides = [REFERENCE, *(side for side in asked if side != REFERENCE)]
    names = [side.name for side in sides]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--side {name}: the name is given twice ({REFERENCE.name} is the reference's): choose another")
    return sides


def cache_types(side: Side) -> dict[str, Any]:
    """type_k and type_v as llama_cpp wants them; none if the engine chooses."""
    if side.type == "auto":
        return {}
    names = side.type.split("/") if "/" in side.type else [side.type] * 2
    kinds = [getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", None) for name in names]
    if len(kinds) != 2 or None in kinds:
        raise ValueError(
            f"side {side.name}: type={side.type} is unknown: f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, two of them for K and V "
            "(q8_0/q4_0), or auto"
        )
    return {"type_k": kinds[0], "type_v": kinds[1]}


def open_side(side: Side, length: int, arguments: argparse.Namespace) -> Llama:
    return Llama(
        str(arguments.model), n_ctx=side.n_ctx(length), n_batch=BATCH_TOKENS, n_ubatch=BATCH_TOKENS, n_gpu_layers=arguments.n_gpu_layers,
        n_threads=arguments.threads, n_threads_batch=arguments.threads, **cache_types(side), seed=1, verbose=False, offload_kqv=not side.in_host_ram,
        swa_full=False,  # windowed layers hold their window, as in llama.cpp's own programs; llama-cpp-python would keep every token
        kv_policy=side.policy, kv_pool=side.cells(length) if side.is_pooled else None,
    )  # fmt: skip


def config_text(llm: Llama) -> str:
    config = llm.kv_config()
    if config is None:
        return f"full,n_ctx={llm.n_ctx()}"
    if config.calibration:  # a path says nothing elsewhere
        config = dataclasses.replace(config, calibration=Path(config.calibration).name)
    return config.to_string()


def read_counters(llm: Llama) -> dict[str, Any]:
    """kv_stats() as a dict, with what this engine may not have as 0."""
    stats = {"device_index_bytes": 0, "rewalks_total": 0, **dataclasses.asdict(llm.kv_stats())}
    return {**stats, "device_bytes": stats["device_kv_bytes"] + stats["device_index_bytes"]}


def require_frozen(side: Side, length: int, stats: dict[str, Any]) -> None:
    if side.is_pooled and not stats["frozen_cells"]:
        raise SystemExit(
            f"bench: side {side.name} froze nothing at {length} tokens (pool of {stats['pool_cells']} cells): "
            "the row would not show the policy; lower its pool or raise --length"
        )
