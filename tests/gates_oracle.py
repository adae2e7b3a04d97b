"""What a gate should learn, from llama.cpp's graph without flash attention: queries and keys by their names, the rest in NumPy."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
from attention_oracle import _EVAL_CALLBACK, _ggml


def queries_and_keys(path: str, tokens: list[int]) -> dict[str, np.ndarray]:
    """Of one pass over the tokens, behind RoPE ("Qcur-0", "Kcur-0"), and the inputs of layers ("attn_norm-0")."""
    ggml, found = _ggml(), {}

    def on_node(node: int, ask: bool, _user: int) -> bool:
        name = ggml.ggml_get_name(node).decode()
        wanted = name.startswith(("Qcur-", "Kcur-", "attn_norm-")) and " " not in name
        if wanted and not ask:  # the last of a name is the one behind RoPE
            values = np.ctypeslib.as_array(ggml.ggml_get_data_f32(node), shape=(ggml.ggml_nelements(node),))
            found[name] = values.copy().reshape(len(tokens), -1)
        return wanted or not ask

    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 256 * -(-len(tokens) // 256)
    params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    callback = _EVAL_CALLBACK(on_node)
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = llama_cpp.llama_init_from_model(model, params)
    kept = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(kept, len(tokens))) == 0
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def targets(q: np.ndarray, k: np.ndarray, n_document: int, begin: int, end: int, n_heads_kv: int, scale: float) -> np.ndarray:
    """Of one chunk of a document, behind which it was repeated: [tokens of the chunk, KV heads], query by query."""
    head = k.shape[1] // n_heads_kv
    q, k = q.astype(np.float64).reshape(len(q), n_heads_kv, -1, head), k.astype(np.float64).reshape(len(k), n_heads_kv, head)
    best = np.zeros((end - begin, n_heads_kv))
    for i in range(n_document, len(q)):
        seen = [*range(min(4, begin)), *range(begin, end), *range(n_document, i + 1)]
        for h in range(n_heads_kv):
            weight = np.exp(k[seen, h] @ q[i, h].T * scale)
            weight = (weight / weight.sum(0)).max(1)
            best[:, h] = np.maximum(best[:, h], weight[min(4, begin) :][: end - begin])
    return best
