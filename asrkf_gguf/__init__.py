"""A KV cache that freezes, for llama.cpp: a context larger than the pool of KV cells on the device.

    from asrkf_gguf import Llama
    llm = Llama("model.gguf", n_ctx=32768, n_gpu_layers=-1, kv_policy="asrkf")
"""

from . import _native
from ._native import KVError, KVStatus
from .config import FreezeConfig
from .llama import Llama
from .models import resolve_model
from .plan import Plan, plan
from .stats import GroupStats, KVStats, OutputEntropy

__version__ = _native.ffi.string(_native.lib.asrkf_version()).decode()
__all__ = ["FreezeConfig", "GroupStats", "KVError", "KVStats", "KVStatus", "Llama", "OutputEntropy", "Plan", "plan", "resolve_model"]
