"""`asrkf plan`: does a model fit a device, with which cache, and what is the command. Only headers are read, nothing is allocated.

Each side is a trial: llama.cpp makes the context's tensors and graphs of a model without weights and says how many bytes they
would take. What the pool is, of which types and how large, is the engine's choice in such a trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import llama_cpp
from tabulate import tabulate

from . import _compat, _native
from .config import FreezeConfig
from .family import loaded_model, whole_header
from .header import parts_of
from .llama import with_calibration
from .models import header_or_model
from .stats import human, read_device_memory, read_stats, types_of

STAGED_TOKENS = 64  # that the staging buffer holds of each layer (STAGING_ROWS of native/store/row_mover.cpp)
KINDS = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


@dataclass(frozen=True)
class Side:
    """One way to hold the context, in bytes of the device; `refused` says why there is none."""

    name: str
    kind: str = ""
    """Type of K and V."""
    cells: int = 0
    kv_bytes: int = 0
    index_bytes: int = 0
    compute_bytes: int = 0
    staging_bytes: int = 0
    """For rows on their way between the device and RAM."""
    missing_bytes: int = 0
    """So much too large for the device; 0: it fits."""
    host_bytes: int = 0
    """RAM for frozen tokens, once the context is full."""
    refused: str = ""

    @property
    def cache_bytes(self) -> int:
        return self.kv_bytes + self.index_bytes + self.compute_bytes + self.staging_bytes


@dataclass(frozen=True)
class Partial:
    """The other way to hold a full cache that is too large: fewer layers on the device. What is left in RAM is read there for each token."""

    kind: str
    """Type of K and V."""
    n_gpu_layers: int
    """The most that fit; the output counts as one."""
    n_layers: int
    host_weights_bytes: int
    host_kv_bytes: int
    """Of a full context."""


@dataclass(frozen=True)
class Plan:
    """What `asrkf plan` prints."""

    model: str
    n_ctx: int
    n_trained: int
    """Tokens of context that the model was trained for."""
    device: str
    device_bytes: int
    """That it has free, or is taken to have."""
    margin_bytes: int
    """That stay free there."""
    weights_bytes: int
    host_weights_bytes: int
    ram_bytes: int
    """Available on this machine."""
    is_estimate: bool
    """The device is not here: compute buffers are those of a CPU, with what a GPU is known to add."""
    sides: tuple[Side, ...]
    partials: tuple[Partial, ...] = ()
    """Of upstream's sides that do not fit; the one that leaves least in RAM comes first."""
    command: str = ""
    """Of the side with a pool, if it fits."""


@contextlib.contextmanager
def _context(model: Any, policy: str, kind: str, n_ctx: int, n_ubatch: int) -> Iterator[Any]:
    """A trial's context; ValueError with the engine's reason."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_ubatch, parameters.n_batch = n_ctx, n_ubatch, max(n_ubatch, 512)
    parameters.type_k = parameters.type_v = KINDS[kind]
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    _native.lib.asrkf_clear_error()
    _native.check(_native.lib.asrkf_next_context(_native.parse_config(policy)))
    try:
        with _compat.quiet():
            context = llama_cpp.llama_init_from_model(model, parameters)
    finally:
        _native.lib.asrkf_next_context(_native.ffi.NULL)
    if not context:
        raise ValueError(_native.last_error() or f"llama.cpp makes no context of {n_ctx} tokens with a {kind} cache")
    try:
        yield context
    finally:
        with _compat.quiet():
            llama_cpp.llama_free(context)


def _weights_of(path: Path) -> tuple[int, int]:
    """Bytes on a GPU that has all layers, and in RAM: the input embeddings, of which a tied output is a second copy on the GPU."""
    sizes = {name: n_bytes for part in parts_of(path) for name, n_bytes in whole_header(part).tensors.items()}
    embeddings = sizes.get("token_embd.weight", 0)
    return sum(sizes.values()) - (embeddings if "output.weight" in sizes else 0), embeddings


def _partial(side: Side, path: Path, n_layers: int, room_bytes: int) -> Union[Partial, None]:
    """With as many layers as have room beside the compute buffers. llama.cpp takes the output first, and then the last layers."""
    sizes = {name: n_bytes for part in parts_of(path) for name, n_bytes in whole_header(part).tensors.items()}
    layers = [sum(n for name, n in sizes.items() if name.startswith(f"blk.{il}.")) for il in range(n_layers)]
    output = sum(n for name, n in sizes.items() if name.startswith("output")) + (0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0))
    left, n_there = room_bytes - side.compute_bytes - output, 0
    while left >= 0 and n_there < n_layers and left >= layers[-1 - n_there] + side.kv_bytes // n_layers:
        left -= layers[-1 - n_there] + side.kv_bytes // n_layers
        n_there += 1
    if left < 0:
        return None
    beside = n_layers - n_there
    return Partial(side.kind, n_there + 1, n_layers + 1, sum(layers[:beside]), side.kv_bytes * beside // n_layers)


def _bytes(size: Union[int, str]) -> int:
    """A size as the configuration reads it: "8GiB"."""
    return int(_native.parse_config(f"asrkf,device_limit={size}").device_limit)


def plan(
    model: str, n_ctx: int = 0, *, vram: Union[int, str, None] = None, kv_policy: str = "asrkf", n_ubatch: int = 512, n_gpu_layers: int = -1
) -> Plan:
    """What `model` needs on the device, or on a card with `vram` bytes ("8GiB") free, for n_ctx tokens (0: those of its training).

    model: the path of a GGUF (the first file, if it is split), or "hf:OWNER/REPO[:QUANT]", of which only the header is read.
    kv_policy: of the side with a pool. ValueError with the reason if the model cannot be read.
    """
    if n_ctx < 0 or n_ubatch < 1:
        raise ValueError(f"n_ctx={n_ctx}, n_ubatch={n_ubatch}: n_ctx is 0 (the training's) or more, n_ubatch 1 or more")
    config = FreezeConfig.from_string(kv_policy).with_types(are_named=False)
    with tempfile.TemporaryDirectory() as scratch:
        path = header_or_model(model, Path(scratch))
        policy = with_calibration(config, str(path)).to_string()
        with loaded_model(path, no_alloc=True, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE, n_gpu_layers=n_gpu_layers) as trial:
            n_trained = llama_cpp.llama_model_n_ctx_train(trial)
            made = _plan(model, path, trial, n_ctx or n_trained, n_trained, vram, policy, n_ubatch)
    if made.is_estimate and n_gpu_layers >= 0:
        raise ValueError("n_gpu_layers needs the card here: for one that is not, the plan says how many layers would fit")
    differs = {"--kv-policy": (kv_policy, "asrkf"), "--n-gpu-layers": (n_gpu_layers, -1), "--ubatch": (n_ubatch, 512)}
    options = [f"{name} {value}" for name, (value, default) in differs.items() if value != default]
    command = " ".join([f"asrkf run {model} -c {made.n_ctx}", *options])
    return made if made.sides[-1].refused or made.sides[-1].missing_bytes else dataclasses.replace(made, command=command)


def _plan(name: str, path: Path, model: Any, n_ctx: int, n_trained: int, vram: Union[int, str, None], policy: str, n_ubatch: int) -> Plan:
    with _context(model, "full", "f16", n_ctx, n_ubatch) as context:
        rows = read_device_memory(context)
        n_ctx = llama_cpp.llama_n_ctx(context)
    card = next((row for row in rows if not row.is_host), None)
    host = next((row for row in rows if row.is_host), rows[0])
    device_bytes = _bytes(vram) if vram is not None else sum(row.free_bytes for row in rows if not row.is_host) or host.free_bytes
    weights = of_trial = sum(row.weights_bytes for row in rows if card is None or not row.is_host)
    beside = host.weights_bytes if card is not None else 0
    is_elsewhere = card is None and vram is not None
    if is_elsewhere:
        weights, beside = _weights_of(path)
    _native.check(_native.lib.asrkf_pretend_free(device_bytes + of_trial - weights if vram is not None else 0))
    try:
        def side(label: str, policy: str, kind: str) -> Side:
            try:
                with _context(model, policy, kind, n_ctx, n_ubatch) as context:
                    stats, rows = read_stats(context), [row for row in read_device_memory(context) if card is None or not row.is_host]
            except ValueError as error:
                return Side(label, refused=str(error))
            kind = types_of(stats) or kind
            cache, graphs = (sum(getattr(row, field) for row in rows) for field in ("cache_bytes", "compute_bytes"))
            compute = stats.device_compute_bytes  # the model's graphs, and those of the scores, which count as the context's
            cache -= max(0, compute - graphs)
            kv = cache - stats.device_index_bytes
            if is_elsewhere and kind != "f16":  # flash attention on a GPU copies a layer's K and V to F16 when it reads a prompt
                layer_bytes = f16_bytes // llama_cpp.llama_model_n_layer(model)
                compute = max(compute, stats.pool_cells * (layer_bytes // n_ctx + 2 * n_ubatch))
            is_staged = card is not None or is_elsewhere or ",moves=staged" in policy
            staging = STAGED_TOKENS * sum(group.token_bytes for group in stats.groups) if is_staged else 0  # upstream's cache has no groups
            needed = weights + margin + cache + compute + staging
            frozen = kv * n_ctx // stats.pool_cells if stats.pool_cells < n_ctx else 0
            return Side(label, kind, stats.pool_cells, kv, stats.device_index_bytes, compute, staging, max(0, needed - device_bytes), frozen)

        with _context(model, "full", "f16", n_ctx, n_ubatch) as context:
            there = [row for row in read_device_memory(context) if card is None or not row.is_host]
            margin, f16_bytes = sum(row.margin_bytes for row in there), sum(row.cache_bytes for row in there)
        sides = [side("upstream", "full", kind) for kind in KINDS]
        sides.append(side(policy.split(",")[0], policy, "f16"))
    finally:
        _native.lib.asrkf_pretend_free(0)
    device = "a card that is not here" if is_elsewhere else (card or host).name
    partials: list[Partial] = []
    if is_elsewhere or card is not None:
        n_layers = llama_cpp.llama_model_n_layer(model)
        found = (_partial(each, path, n_layers, device_bytes - margin) for each in sides[:-1] if each.missing_bytes)
        partials = sorted(filter(None, found), key=lambda each: each.host_weights_bytes + each.host_kv_bytes)
    return Plan(
        name, n_ctx, n_trained, device, device_bytes, margin, weights, beside, host.free_bytes, is_elsewhere, tuple(sides), tuple(partials)
    )


def to_text(made: Plan) -> str:
    """A table for the terminal."""
    rows: list[list[Any]] = []
    for side in made.sides:
        if side.refused:
            rows.append([side.name, *[""] * 8, "no (below)"])
            continue
        fits = "yes" if not side.missing_bytes else f"no, {human(side.missing_bytes)} too large"
        rows.append([side.name, side.kind, side.cells, human(side.kv_bytes), human(side.index_bytes), human(side.compute_bytes),
                     human(side.staging_bytes), human(made.weights_bytes + side.cache_bytes), human(side.host_bytes), fits])  # fmt: skip
    about = "compute (estimate)" if made.is_estimate else "compute"
    lines = [
        f"{made.model}: {made.n_ctx} tokens; {made.device}: {human(made.device_bytes)} free, of which {human(made.margin_bytes)} stay free",
        f"weights: {human(made.weights_bytes)} there, {human(made.host_weights_bytes)} beside it in RAM; RAM available here: {human(made.ram_bytes)}",
        tabulate(rows, ["cache", "type", "cells", "K and V", "index", about, "staging", "with weights", "RAM for frozen", "fits"]),
        *(f"{side.name}: {side.refused}" for side in made.sides if side.refused),
        *(f"upstream {other.kind} with {other.n_gpu_layers} of {other.n_layers} layers there: about {human(other.host_weights_bytes)} of weights and "
          f"{human(other.host_kv_bytes)} of K and V stay in RAM, where the CPU reads them for each token" for other in made.partials),
    ]  # fmt: skip
    if made.n_ctx > made.n_trained:
        lines.append(f"warning: the model was trained for {made.n_trained} tokens; past them it writes nonsense, whatever the cache")
    if (most := max(side.host_bytes for side in made.sides)) > made.ram_bytes:
        lines.append(f"warning: a full context freezes up to {human(most)}, more than the RAM that is available here")
    if made.command:
        lines.append(f"command: {made.command}")
    return "\n".join(lines)


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", help="path of a GGUF, smollm2, or hf:OWNER/REPO[:QUANT] (only its header is read)")
    parser.add_argument("--vram", help='plan for a card with so many bytes free, "8GiB" (default: the device that is here)')
    parser.add_argument("-c", "--n-ctx", type=int, default=0, help="context, tokens (default: what the model was trained for)")
    parser.add_argument("--kv-policy", default="asrkf", help='of the side with a pool: a preset, or "name,key=value,..." (default asrkf)')
    parser.add_argument("--ubatch", type=int, default=512, help="tokens in a step (default 512)")
    parser.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    parser.add_argument("--json", action="store_true", help="the numbers, in bytes")


def main(arguments: Any) -> int:
    made = plan(arguments.model, arguments.n_ctx, vram=arguments.vram, kv_policy=arguments.kv_policy, n_ubatch=arguments.ubatch,
                n_gpu_layers=arguments.n_gpu_layers)  # fmt: skip
    print(json.dumps(dataclasses.asdict(made), indent=1) if arguments.json else to_text(made))
    return 0
