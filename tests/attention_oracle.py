"""Attention probabilities of a prompt's last queries, from llama.cpp's graph without flash attention; and ReFreeKV's rule on them, in NumPy."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from asrkf_gguf import _native

_EVAL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def _ggml() -> ctypes.CDLL:
    ggml = ctypes.CDLL(str(_native.LIBRARY_FOLDER / "libggml-base.so"))
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_nelements.restype, ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    ggml.ggml_get_data_f32.restype, ggml.ggml_get_data_f32.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
    return ggml


def attention_rows(
    path: str | Path, tokens: list[int], n_rows: int = 1, type_k: int = llama_cpp.GGML_TYPE_F16, layers: tuple[int, ...] = ()
) -> list[np.ndarray]:
    """Of these layers, or all: [heads, tokens], the mean of the last n_rows queries, each of which sees what lies before it. On the CPU."""
    ggml, found = _ggml(), {}

    def on_node(node: int, ask: bool, _user: int) -> bool:
        name = ggml.ggml_get_name(node).decode()
        if name.startswith("kq_soft_max-") and not ask:
            n = ggml.ggml_nelements(node)
            values = np.ctypeslib.as_array(ggml.ggml_get_data_f32(node), shape=(n,))
            found[int(name.split("-")[1])] = values.copy()
        return name.startswith("kq_soft_max-") if ask else True

    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    n_heads = llama_cpp.llama_model_n_head(model)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 256 * -(-len(tokens) // 256)
    params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 2
    params.type_k = type_k
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    callback = _EVAL_CALLBACK(on_node)
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = llama_cpp.llama_init_from_model(model, params)
    kept = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch has no reference of its own
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(kept, len(tokens))) == 0
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    rows = [found[layer].reshape(n_heads, len(tokens), -1)[:, -n_rows:, : len(tokens)].mean(1) for layer in layers or sorted(found)]
    assert all(abs(row.sum(1) - 1).max() < 1e-3 for row in rows)
    return rows


def losses(row: np.ndarray, order: np.ndarray, n_sinks: int = 4) -> np.ndarray:
    """Of [heads, tokens]: the loss when the first 0, 1, ... of `order` are gone; sinks do not count."""
    squares = row.astype(np.float64) ** 2
    squares[:, :n_sinks] = 0
    gone = np.concatenate([np.zeros((len(row), 1)), np.cumsum(squares[:, order], 1)], 1)
    norms = np.sqrt(np.maximum(squares.sum(1, keepdims=True) - gone, 0)).mean(0)
    return 1 - norms / norms[0]
