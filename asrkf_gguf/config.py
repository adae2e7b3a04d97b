"""The freeze configuration: one frozen dataclass, checked by the engine's own table."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional, Union

from . import _native

PoolSize = Union[int, float, str]
POLICIES = ("full", "asrkf", "paper", "window", "random", "flag-all", "refreekv", "kvzip")
PRESETS = ("quality", "default", "aggressive")
"""asrkf with a half, a third and an eighth of the full F16 cache's bytes."""


@dataclass(frozen=True)
class FreezeConfig:
    """How tokens are frozen and restored. None means the preset's value; `resolved()` shows them all.

    The method is ASR-KF-EGR (arXiv 2512.11221) with a budget in place of its threshold; the `paper` preset is as
    published, where it is known. `refreekv` and `kvzip` are other methods' (ReFreeKV, arXiv 2502.16886; Fast KVzip, arXiv
    2601.17668). Invalid values raise ValueError with key, value and range.
    """

    policy: str = "asrkf"
    """"full" (upstream's cache), "asrkf", "paper", "refreekv", "kvzip", or a control: "window", "random", "flag-all"; or asrkf with a part of the
    full F16 cache's bytes: "quality" (a half), "default" (a third), "aggressive" (an eighth)."""
    pool: Optional[PoolSize] = None
    """Size of the pool: "auto" (what fits the device), cells (2048), part of n_ctx (0.25), bytes of K, V and index ("512MiB"), or so
    much of the bytes of a full F16 cache of the served layers ("33%"). `Llama(kv_pool=...)` sets it."""
    types: Optional[str] = None
    """Types of K and V: "given" (type_k, type_v), or "auto": the best that the pool's bytes have room for. `Llama` takes "auto" for
    a pool of bytes if no type is named."""
    layers: Optional[str] = None
    """"shared": one set of active tokens; "two" or "each": layer groups, with budgets by sensitivity; or groups with a pool
    each, "0-8@512/9-29@1024"."""
    calibration: Optional[str] = None
    """File of `asrkf calibrate` with the layers' sensitivities, or "off" for a guess by depth. None: the model's own, found or made."""
    gates: Optional[str] = None
    """File of `asrkf gates`, for score="gate". None: the model's own from the cache folder."""
    sinks: Optional[int] = None
    """First positions that are never frozen."""
    window: Optional[int] = None
    """Most recent positions that are never frozen; 0: half of the pool."""
    interval: Optional[int] = None
    """Tokens between two decisions."""
    score: Optional[str] = None
    """"attention" (softmax probability), "magnitude" (mean |q.k|), "random", "recency", "none", or "gate": what the layer's gate
    says of the token when it is computed (`asrkf gates` makes them; no index is kept)."""
    score_layers: Optional[str] = None
    """Layers that score for all groups, "0-3+7"; "auto": the calibration's, or by depth without one."""
    score_queries: Optional[int] = None
    """Queries that score: of the newest steps, and from all over a long one."""
    index: Optional[str] = None
    """Type of the scoring layers' K rows that stay on the device for all tokens: "auto" (q4_0 where it divides the head, f16
    for recall="mean_key"), "f16", "q8_0", "q4_0"."""
    ema: Optional[float] = None
    """Weight of the old score after an interval (0..1)."""
    hysteresis: Optional[float] = None
    """An active token's score counts this much more (0.2: a fifth)."""
    ranking: Optional[str] = None
    """Who stays active in a layer group: "shared", what the scoring layers attend to; or "own", that times how much more the group's
    own layers attended to the token when they last had it (with recall)."""
    recall: Optional[str] = None
    """Frozen tokens have fresh scores, and come back when a live query asks for them: by every token's key ("exact") or by
    the mean key of 16 tokens ("mean_key": a smaller index, less exact); "off"."""
    recall_share: Optional[float] = None
    """Part of the history's cells for the blocks of 16 that the newest queries score best."""
    recall_limit: Optional[int] = None
    """Most restores by recall, for each token that is decoded."""
    rewalk_tokens: Optional[int] = None
    """Last tokens of a prompt that are computed again once the blocks they ask for are back; 0: none."""
    recovery: Optional[str] = None
    """Highest level of recovery that output entropy may start: "off", "soft", "window", "full"; or "second_look": a token that missed
    much attention is computed once more, with what it asks for restored."""
    trigger: Optional[str] = None
    """"entropy", or "random": the control, at the same rate."""
    trigger_share: Optional[float] = None
    """Part of the outputs that may start a recovery (0..0.5)."""
    look_share: Optional[float] = None
    """Part of the tokens that second_look may compute once more, at most (0..0.5)."""
    look_trigger: Optional[str] = None
    """"missed" (attention), or for comparison "entropy" or "random", at the same share."""
    softness: Optional[float] = None
    """k of the freeze timer floor(sqrt(c)/k), in decisions."""
    timer_share: Optional[float] = None
    """Part of the pool for tokens that are back because their timer ended (0..0.5)."""
    timer_grace: Optional[int] = None
    """Decisions that such a token stays before it is judged again."""
    tau: Optional[float] = None
    """Threshold of the paper preset: tokens that score less are flagged."""
    tolerance: Optional[float] = None
    """Of refreekv: the part of the last query's attention norm that a cut may take from a layer (0..1)."""
    rows: Optional[int] = None
    """Of refreekv: the newest queries whose attention is averaged for it."""
    order: Optional[str] = None
    """Of refreekv, who goes first: the oldest tokens ("position"), or those with the lowest scores ("relevance")."""
    repeat: Optional[int] = None
    """Of refreekv: tokens that are generated between two cuts; 0: where a prompt ends, and never again."""
    gate_threshold: Optional[float] = None
    """Of kvzip: tokens whose gate says less are frozen even where the pool has room (0..1); 0: as many stay as the pool holds."""
    block: Optional[int] = None
    """Positions in a block, the unit of sealing."""
    pinned: Optional[str] = None
    """Position ranges that are never frozen, "0-128+512-640", ends excluded."""
    host_limit: Optional[Union[int, str]] = None
    """Most bytes of the host store ("8GiB"); 0: no limit."""
    device_limit: Optional[Union[int, str]] = None
    """For pool="auto": most bytes on each device, weights and compute buffers among them ("8GiB"); 0: what is free."""
    moves: Optional[str] = None
    """"auto", "direct" (memcpy; device memory is host memory) or "staged" (through a staging buffer)."""
    state: Optional[str] = None
    """What a saved state holds: all tokens, and scores and timers ("own": loads here only), or llama.cpp's own format
    ("upstream": all tokens, loads anywhere)."""
    seed: Optional[int] = None
    """Of the random score."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float, str, type(None))):
                raise TypeError(f"{field.name}={value!r}: expected a number or a string, got {type(value).__name__}")
            if isinstance(value, str) and "," in value:
                raise ValueError(f"{field.name}={value!r}: a value holds no comma")
        _native.parse_config(self.to_string())

    @classmethod
    def from_string(cls, text: str) -> FreezeConfig:
        """Read "name,key=value,..." (the form of the environment variable LLAMA_KV_POLICY)."""
        _native.parse_config(text)  # unknown keys are refused there, with the nearest known one
        policy, *pairs = text.split(",")
        kinds = {row["name"]: row["kind"] for row in _native.config_table()}
        return cls(policy, **{key: _number(value, kinds[key]) for key, value in (pair.split("=", 1) for pair in pairs)})

    def to_string(self) -> str:
        """The configuration as "name,key=value,...", without what is left to the preset."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self)[1:])
        return ",".join([self.policy, *(f"{name}={value}" for name, value in pairs if value is not None)])

    def resolved(self) -> dict[str, str]:
        """Every key with the value that runs, as strings."""
        policy, *pairs = _native.format_config(_native.parse_config(self.to_string())).split(",")
        return {"policy": policy, **dict(pair.split("=", 1) for pair in pairs)}

    def with_types(self, are_named: bool) -> FreezeConfig:
        """The same configuration, which may choose the cache's types if nobody named them and the pool is bytes, not cells."""
        pool = self.resolved().get("pool", "")
        chooses = not are_named and self.types is None and (pool == "auto" or pool.endswith(("B", "%")))
        return dataclasses.replace(self, types="auto") if chooses else self

    def with_pool(self, pool: Optional[PoolSize]) -> FreezeConfig:
        """The same configuration with this pool; ValueError if it has another one already."""
        if pool is None:
            return self
        if self.pool is not None and self.pool != pool:
            raise ValueError(f"kv_pool={pool!r} contradicts FreezeConfig(pool={self.pool!r}): give one of the two")
        return dataclasses.replace(self, pool=pool)


def _number(text: str, kind: str) -> Any:
    """A value of the configuration table as its field has it: a number where it is one, else text ("8GiB")."""
    for read in {"integer": (int,), "bytes": (int,), "real": (int, float), "pool": (int, float)}.get(kind, ()):
        with contextlib.suppress(ValueError):
            return read(text)
    return text
