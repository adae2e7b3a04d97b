"""What the cache did, measured: frozen dataclasses over the C API's stats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf

from . import _native
from .config import POLICIES

MIB = 1 << 20


def human(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / MIB:.1f} MiB"


def types_of(cache: Any) -> str:
    """The types of K and V of what has type_k and type_v: "q8_0", or "q8_0/q5_0"."""
    return cache.type_k if cache.type_k == cache.type_v else f"{cache.type_k}/{cache.type_v}"


@dataclass(frozen=True)
class GroupStats:
    """One layer group: layers that share one set of active tokens."""

    n_layers: int
    pool_cells: int
    window: int
    max_ubatch: int
    active_cells: int
    active_copied_cells: int
    frozen_cells: int
    kept_ratio: float
    """Of the tokens at the last cut of "refreekv"; -1: none yet, or these layers have none."""
    wanted_ratio: float
    """And what its rule would have kept in a larger pool."""
    sliding_window: int
    """Tokens that these layers see: the group keeps them whatever the policy; 0: all."""
    token_bytes: int
    device_kv_bytes: int
    layers: str
    """The model's, as `layers=` of a policy names them: "0-4+7"."""


@dataclass(frozen=True)
class KVStats:
    """Measured state of a context's KV cache. `_bytes` are what was allocated or moved, never derived from cells.

    Cells are means over the layers; `groups` has those of each layer group. Counters (`_total`, moved bytes, seconds) run from
    the last clear of the cache.
    """

    policy: str
    """The policy that really runs; "full" is upstream's cache."""
    pool_choice: str
    """What was chosen for a pool of bytes (or "auto"), and why; "" where cells were asked for."""
    type_k: str
    """Types of the cache, "f16" or "q8_0"; "" where upstream's cache has several parts."""
    type_v: str
    pool_cells: int
    active_cells: int
    frozen_cells: int
    enough_cells: int
    """The pool with which the last cut of "refreekv" could have kept all that its rule wanted, in every layer; 0: no cut yet."""
    n_sequences: int
    """That have tokens."""
    tokens: int
    """Of all sequences, those that they share once."""
    device_kv_bytes: int
    device_index_bytes: int
    """K rows of the scoring layers in a small type, for all tokens, or means of them; and the newest queries. Of "refreekv": queries. Of "kvzip":
    the gates' weights, and the scores of a step."""
    device_staging_bytes: int
    device_compute_bytes: int
    host_kv_bytes: int
    host_kv_peak_bytes: int
    moved_to_host_bytes: int
    moved_to_device_bytes: int
    moves_to_host_total: int
    moves_to_device_total: int
    freezes_total: int
    restores_total: dict[str, int]
    """By cause: "timer", "window" (protected again), "refill" (room in the pool), "recall" (a live query asked),
    "recovery" (output entropy asked, or a second look), "request"."""
    restores_redundant_total: int
    """Recalls that did not outlast the next decision."""
    cuts_total: int
    """Times that the rule of "refreekv" was applied: where a prompt ended, and with `repeat` after that."""
    rewalks_total: int
    """Times that the end of a prompt was computed again."""
    rewalked_tokens_total: int
    second_looks_total: int
    """Tokens that were computed a second time, for what they missed (recovery=second_look)."""
    recoveries_total: dict[str, int]
    """By level: "soft", "window", "full"."""
    outputs_total: int
    """Outputs whose entropy was measured (while a trace runs, or with recovery)."""
    kept_ratio: float
    """Of the tokens at the last cut of "refreekv", mean over the layers; -1: no cut yet."""
    missed_attention_ratio: float
    """At the last scoring: the part of the scoring layers' attention that fell on frozen tokens, mean of all heads; -1: no scores."""
    missed_attention_worst_ratio: float
    """And of the worst head."""
    entropy: float
    """Nats, of the last of them; with running mean and standard deviation."""
    entropy_mean: float
    entropy_deviation: float
    steps_total: int
    decisions_total: int
    scoring_steps_total: int
    policy_seconds: float
    scoring_seconds: float
    """Waiting for scores and folding them in; computing them is part of the step."""
    moves_seconds: float
    scoring_backend: str
    """What computes scores: "graph" (ggml's operations), "cuda" (kernels of ours), "cuda+graph" where devices differ; "gates": the
    model's graph ("kvzip"); "none": nothing is scored."""
    ranking: str
    """What tokens are ranked by: "shared" scores of the index, or each layer's "own" attention as well; "none": no index is scored. A
    device that lacks an operation for ranking=own has "shared"."""
    groups: tuple[GroupStats, ...]


@dataclass(frozen=True)
class OutputEntropy:
    """What an output says of the next token, in nats."""

    log_sum_exp: float
    """Of the logits: a token's log-probability is its logit less this."""
    entropy: float
    top_probability: float


def read_output_entropy(context: Any, row: int) -> OutputEntropy:
    """Of an output row of a llama_cpp context, counted as llama_get_logits_ith() does."""
    raw = _native.struct("asrkf_output")
    _native.check(_native.lib.asrkf_output_entropy(_native.context_pointer(context), row, raw))
    return OutputEntropy(raw.log_sum_exp, raw.entropy, raw.top_probability)


_CAUSES = ("timer", "window", "refill", "recall", "recovery", "request")
_LEVELS = ("soft", "window", "full")


def _pool_choice(pointer: Any) -> str:
    out = _native.ffi.new("char[]", 4096)
    _native.check(_native.lib.asrkf_get_pool_choice(pointer, out, 4096))
    return _native.ffi.string(out).decode()


def _type_name(kind: int) -> str:
    return gguf.GGMLQuantizationType(kind).name.lower() if kind >= 0 else ""


def read_stats(context: Any) -> KVStats:
    """Stats of a llama_cpp context (its `ctx` pointer)."""
    pointer = _native.context_pointer(context)
    raw = _native.struct("asrkf_stats")
    _native.check(_native.lib.asrkf_get_stats(pointer, raw))
    groups = []
    for index in range(raw.n_groups if raw.policy else 0):
        group = _native.struct("asrkf_group_stats")
        _native.check(_native.lib.asrkf_get_group_stats(pointer, index, group))
        plain = {name: getattr(group, name) for name in GroupStats.__dataclass_fields__ if name != "layers"}
        groups.append(GroupStats(**plain, layers=_native.ffi.string(group.layers).decode()))
    special: dict[str, Any] = {
        "policy": POLICIES[raw.policy],
        "pool_choice": _pool_choice(pointer) if raw.policy else "",
        **{name: _type_name(getattr(raw, name)) for name in ("type_k", "type_v")},
        **{name: _native.ffi.string(getattr(raw, name)).decode() for name in ("scoring_backend", "ranking")},
        "restores_total": {name: getattr(raw, f"restores_{name}_total") for name in _CAUSES},
        "recoveries_total": {name: getattr(raw, f"recoveries_{name}_total") for name in _LEVELS},
        "groups": tuple(groups),
    }
    plain = {name: getattr(raw, name) for name in KVStats.__dataclass_fields__ if name not in special}
    return KVStats(**plain, **special)


@dataclass(frozen=True)
class DeviceMemory:
    """What a context has on one device: allocated, or for a model that was loaded with no_alloc, what would be."""

    name: str
    is_host: bool
    weights_bytes: int
    cache_bytes: int
    """K, V and index."""
    compute_bytes: int
    free_bytes: int
    margin_bytes: int
    """That pool="auto" would leave free."""


def read_device_memory(context: Any) -> list[DeviceMemory]:
    """Of every device that holds something of a llama_cpp context."""
    rows: list[DeviceMemory] = []
    raw = _native.struct("asrkf_device_memory")
    while _native.lib.asrkf_get_device_memory(_native.context_pointer(context), len(rows), raw) == _native.KVStatus.OK:
        plain = {name: getattr(raw, name) for name in DeviceMemory.__dataclass_fields__ if name not in ("name", "is_host")}
        rows.append(DeviceMemory(_native.ffi.string(raw.name).decode(), bool(raw.is_host), **plain))
    _native.lib.asrkf_clear_error()
    return rows


# restores_redundant_total and outputs_total begin anew with a sequence or a loaded state: no difference of theirs means anything
_COUNTERS = (
    "moved_to_host_bytes", "moved_to_device_bytes", "moves_to_host_total", "moves_to_device_total", "freezes_total", "restores_total",
    "cuts_total", "rewalks_total", "rewalked_tokens_total", "second_looks_total", "recoveries_total", "steps_total", "decisions_total",
    "scoring_steps_total",
    "policy_seconds", "scoring_seconds", "moves_seconds",
)  # fmt: skip


def counted_since(before: KVStats, after: KVStats) -> dict[str, Any]:
    """What the counters gained between two readings with no clear of the cache between them."""

    def gain(old: Any, new: Any) -> Any:
        return {key: gain(old[key], new[key]) for key in new} if isinstance(new, dict) else new - old

    return {name: gain(getattr(before, name), getattr(after, name)) for name in _COUNTERS}
