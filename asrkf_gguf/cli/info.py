"""`asrkf info`: what this build can do, and what a model's cache needs."""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path

import llama_cpp

from .. import __version__, _native
from ..config import POLICIES, PRESETS, FreezeConfig
from ..models import MODEL_FORMS, header_or_model, kv_bytes_per_token
from ..stats import MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=MODEL_FORMS)


def devices() -> list[str]:
    """Names of ggml's devices. (llama_supports_gpu_offload() is true for every build that has RPC.)"""
    ggml = ctypes.CDLL(str(_native.LIBRARY))  # a handle finds the symbols of its dependencies, too
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    ggml.ggml_backend_dev_name.argtypes, ggml.ggml_backend_dev_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    return [ggml.ggml_backend_dev_name(ggml.ggml_backend_dev_get(i)).decode() for i in range(ggml.ggml_backend_dev_count())]


def main(arguments: argparse.Namespace) -> int:
    print(f"asrkf-gguf {__version__}, libllama from {_native.LIBRARY_FOLDER}")
    print(f"devices: {', '.join(devices())}")
    print(llama_cpp.llama_print_system_info().decode().strip())
    print(f"policies: {', '.join(POLICIES)}; asrkf with a part of the F16 cache's bytes: {', '.join(PRESETS)}")
    print("keys (kv_policy=\"asrkf,key=value,...\", FreezeConfig(key=value), LLAMA_KV_POLICY):")
    defaults = FreezeConfig().resolved()
    for row in _native.config_table():
        print(f"  {row['name']:<14} {defaults.get(row['name'], ''):<10} {row['doc']}{' [' + row['choices'] + ']' if row['choices'] else ''}")
    if arguments.model:
        with tempfile.TemporaryDirectory() as scratch:
            print_cache_of(header_or_model(arguments.model, Path(scratch)))
    return 0


def print_cache_of(path: Path) -> None:
    print(f"{path.name}: bytes of K and V by pool, and of the full cache")
    for kind in ("F16", "Q8_0", "Q4_0"):
        token = kv_bytes_per_token(path, kind)
        sizes = ", ".join(f"{cells}: {cells * token / MIB:.1f} MiB" for cells in (1024, 2048, 4096, 8192, 32768))
        print(f"  {kind:<5} {token} bytes a token; {sizes}")
