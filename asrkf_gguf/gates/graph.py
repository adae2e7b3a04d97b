"""Reads from a model's graph while it computes: the normalised input of each layer, and what its attention sees. Also on a GPU.

llama.h offers it: cb_eval is asked about each node of the graph, and called behind those that it wants. Which node is which is told by
names that llama.cpp gives ("attn_norm-3" is layer 3's normalised input, "cache_k_l3" are its keys) and by the operation.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import llama_cpp
import numpy as np

from .. import _native
from .._compat import quiet

STEP_TOKENS = 512  # decoded at a time
_EVAL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_F32, _F16 = 0, 1  # of enum ggml_type


class _Tensor(ctypes.Structure):
    """The beginning of struct ggml_tensor, in ggml.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int),
        ("op_params", ctypes.c_float * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p),
    ]  # fmt: skip


def _library() -> ctypes.CDLL:
    ggml = ctypes.CDLL(str(_native.LIBRARY.with_name(_native.LIBRARY.name.replace("llama", "ggml-base"))))
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_op_desc.restype, ggml.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_nbytes.restype, ggml.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.restype = None
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return ggml


@dataclass(frozen=True)
class LayerShape:
    """Of a layer that can have a gate."""

    n_embd: int
    n_heads_kv: int
    group: int
    """Query heads of each KV head."""


class Attention:
    """What one layer's attention computes with, in one step. Valid only while it is handed out."""

    def __init__(self, ggml: ctypes.CDLL, node: int, il: int, keys_name: str) -> None:
        self._library, fattn = ggml, _Tensor.from_address(node)
        self.il = il
        self.scale, self.max_bias, self.softcap = fattn.op_params[:3]
        self._q, self._k = fattn.src[0], fattn.src[1]
        q, k = _Tensor.from_address(self._q), _Tensor.from_address(self._k)
        if q.type != _F32 or k.type != _F16 or q.ne[3] != 1 or k.nb[1] != k.ne[2] * k.nb[2]:
            raise RuntimeError(f"layer {il}: queries and keys ({keys_name}) do not lie as expected: this model cannot have gates")
        self.n_heads_kv, self.group = int(k.ne[2]), int(q.ne[2] // k.ne[2])
        storage = _Tensor.from_address(k.view_src)
        self.n_cells = int(storage.ne[1])
        """Of the layer's cache: with small_windows fewer than the context has, if the layer has a window."""

    def queries(self) -> np.ndarray:
        """As they meet the keys, behind RoPE: float32 [tokens, KV heads, group, head]."""
        q = _Tensor.from_address(self._q)
        raw = _read(self._library, self._q, 0, self._library.ggml_nbytes(self._q))
        strided = np.ndarray((q.ne[1], q.ne[2], q.ne[0]), np.float32, raw, strides=(q.nb[1], q.nb[2], q.nb[0]))
        return np.ascontiguousarray(strided).reshape(q.ne[1], self.n_heads_kv, self.group, q.ne[0])

    def keys(self, begin: int, end: int) -> np.ndarray:
        """Of these cells, behind RoPE: float32 [cells, KV heads, head]."""
        k = _Tensor.from_address(self._k)
        raw = _read(self._library, self._k, begin * k.nb[1], (end - begin) * k.nb[1])
        return raw.view(np.float16).reshape(end - begin, k.ne[2], k.ne[0]).astype(np.float32)


def _read(ggml: ctypes.CDLL, tensor: int, offset_bytes: int, n_bytes: int) -> np.ndarray:
    out = np.empty(n_bytes, np.uint8)
    ggml.ggml_backend_tensor_get(tensor, out.ctypes.data, offset_bytes, n_bytes)
    return out


class Session:
    """A context of upstream's cache, with one sequence. In each step, on_input gets the layers' normalised inputs (layer, float32
    [tokens, n_embd]), and on_attention what the layers' attentions see; either may be None. What they raise, decode() raises."""

    def __init__(self, model: Any, n_ctx: int, n_threads: Optional[int], small_windows: bool) -> None:
        self.on_input: Optional[Callable[[int, np.ndarray], None]] = None
        self.on_attention: Optional[Callable[[Attention], None]] = None
        self._library = _library()
        self._stopped: list[BaseException] = []
        self._callback = _EVAL_CALLBACK(self._on_node)  # kept: the context calls it
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, STEP_TOKENS, STEP_TOKENS, 1
        params.n_threads = params.n_threads_batch = n_threads or os.cpu_count() or 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = not small_windows
        params.cb_eval = ctypes.cast(self._callback, type(params.cb_eval))
        _native.check(_native.lib.asrkf_next_context(_native.parse_config("full")))  # whatever LLAMA_KV_POLICY says
        with quiet():
            self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"no context of {n_ctx} tokens: {_native.last_error() or 'llama.cpp gave no reason (out of memory?)'}")
        self._step = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        self.n_tokens = 0

    def _on_node(self, node: int, ask: bool, _user: Any) -> bool:
        try:
            return not self._stopped and self._see(node, ask)
        except BaseException as error:  # Control-C, too, arrives here
            self._stopped.append(error)
            return False

    def _see(self, node: int, ask: bool) -> bool:
        """Is it wanted; or what it is."""
        if self.on_input and (found := re.fullmatch(r"attn_norm-(\d+)", self._name(node))):
            if not ask:
                x = _Tensor.from_address(node)
                if x.type != _F32:
                    raise RuntimeError(f"layer {found[1]}: its normalised input is not F32: this model cannot have gates")
                raw = _read(self._library, node, 0, self._library.ggml_nbytes(node))
                self.on_input(int(found[1]), raw.view(np.float32).reshape(-1, x.ne[0]))
            return True
        if self.on_attention and self._library.ggml_op_desc(node) == b"FLASH_ATTN_EXT":
            keys = _Tensor.from_address(_Tensor.from_address(node).src[1]).view_src
            keys_name = self._name(keys) if keys else "no view of a cache"
            if found := re.fullmatch(r"cache_k_l(\d+)", keys_name):
                if not ask:
                    self.on_attention(Attention(self._library, node, int(found[1]), keys_name))
                return True
        return not ask

    def _name(self, node: int) -> str:
        return self._library.ggml_get_name(node).decode(errors="replace")

    def decode(self, tokens: Sequence[int], progress: Optional[Callable[[int], None]] = None) -> None:
        """Behind what is there, in steps; progress gets each one's tokens."""
        batch = self._step
        for at in range(0, len(tokens), STEP_TOKENS):
            step = tokens[at : at + STEP_TOKENS]
            batch.n_tokens = len(step)
            for i, token in enumerate(step):
                batch.token[i], batch.pos[i] = token, self.n_tokens + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i == len(step) - 1
            status = llama_cpp.llama_decode(self._context, batch)
            if self._stopped:
                raise self._stopped.pop()
            if status:
                raise RuntimeError(f"llama_decode failed with {status} at token {self.n_tokens}: {_native.last_error() or 'no reason given'}")
            self.n_tokens += len(step)
            if progress:
                progress(len(step))

    def keep(self, n_tokens: int) -> None:
        """Only the first ones."""
        memory = llama_cpp.llama_get_memory(self._context)
        if n_tokens == 0:
            llama_cpp.llama_memory_clear(memory, True)
        elif not llama_cpp.llama_memory_seq_rm(memory, 0, n_tokens, -1):
            raise RuntimeError("the model's cache cannot take tokens back (recurrent layers?): it cannot have gates trained")
        self.n_tokens = n_tokens

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._step)
        with quiet():
            llama_cpp.llama_free(self._context)


@contextlib.contextmanager
def session(model: Any, n_ctx: int, n_threads: Optional[int] = None, small_windows: bool = False) -> Iterator[Session]:
    """With small_windows, layers with a sliding window have a cache for it only. Then keep() leaves them without what the window has moved
    past. RuntimeError or KVError if there is no context."""
    opened = Session(model, n_ctx, n_threads, small_windows)
    try:
        yield opened
    finally:
        opened.close()


def layer_shapes(model: Any, n_threads: Optional[int] = None) -> dict[int, LayerShape]:
    """Of the layers that can have a gate: with a cache, and without a sliding window. One token is decoded for it.

    RuntimeError says what a model's graph lacks.
    """
    inputs: dict[int, int] = {}
    attentions: dict[int, Attention] = {}
    window = int(llama_cpp.llama_model_n_swa(model))
    n_ctx = 256 * (-(-(window + STEP_TOKENS) // 256) + 1) if window else 256  # more than a windowed layer's cache has
    with session(model, n_ctx, n_threads, small_windows=True) as probe:
        probe.on_input = lambda il, x: inputs.update({il: x.shape[1]})
        probe.on_attention = lambda seen: attentions.update({seen.il: seen})
        probe.decode([0])
    if not attentions:
        raise RuntimeError("no flash attention over a cache is in the model's graph (cache_k_l0): this model cannot have gates")
    if any(seen.max_bias for seen in attentions.values()):
        raise RuntimeError("the model's attention adds a bias by distance (ALiBi): this model cannot have gates")
    everything = {il: seen for il, seen in sorted(attentions.items()) if seen.n_cells >= n_ctx}
    if not everything:
        raise RuntimeError(f"all layers have a sliding window of {window} tokens: this model needs no gates")
    if missing := [f"attn_norm-{il}" for il in everything if il not in inputs]:
        raise RuntimeError(f"the model's graph names no {', '.join(missing[:3])}{', ...' if missing[3:] else ''}: this model cannot have gates")
    return {il: LayerShape(inputs[il], seen.n_heads_kv, seen.group) for il, seen in everything.items()}
