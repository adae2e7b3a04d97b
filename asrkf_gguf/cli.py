"""The command `asrkf`: run or serve a model with a KV pool, or show what this build can do."""

from __future__ import annotations

import argparse
import ctypes
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from . import _native, calibrate
from .config import POLICIES, FreezeConfig, PoolSize
from .llama import Llama
from .models import kv_bytes_per_token, resolve_model
from .plan import add_arguments as add_plan_arguments
from .plan import main as plan_main
from .stats import MIB, KVStats


def pool_size(text: str) -> PoolSize:
    """A pool as the configuration takes it: whole cells stay an int, the rest is for the engine to read."""
    return int(text) if text.lstrip("-").isdigit() else text


def prompt_progress(llm: Llama, label: str) -> tqdm:
    """A progress bar on stderr (only on a terminal) that follows the prompt as it is read."""
    bar = tqdm(desc=label, unit="tok", disable=not sys.stderr.isatty(), leave=False)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    llm.progress = update
    return bar


def summary(stats: KVStats) -> str:
    """The figures of a run, a few lines."""
    restored = ", ".join(f"{cause} {n}" for cause, n in stats.restores_total.items() if n) or "none"
    return "\n".join(
        [
            f"policy {stats.policy}: {stats.tokens} tokens = {stats.active_cells} active + "
            f"{stats.frozen_cells} frozen, pool {stats.pool_cells} cells",
            f"device: KV {stats.device_kv_bytes / MIB:.1f} MiB, index {stats.device_index_bytes / MIB:.1f} MiB, "
            f"staging {stats.device_staging_bytes / MIB:.1f} MiB, "
            f"compute {stats.device_compute_bytes / MIB:.1f} MiB; host: KV {stats.host_kv_bytes / MIB:.1f} MiB",
            f"moved: {stats.moved_to_host_bytes / MIB:.1f} MiB to host in {stats.moves_to_host_total} calls, "
            f"{stats.moved_to_device_bytes / MIB:.1f} MiB to device in {stats.moves_to_device_total}; "
            f"freezes {stats.freezes_total}, restores: {restored}; rewalked {stats.rewalked_tokens_total} tokens",
            f"seconds: policy {stats.policy_seconds:.3f}, scoring {stats.scoring_seconds:.3f}, moves {stats.moves_seconds:.3f}",
        ]
    )


def run(arguments: argparse.Namespace) -> int:
    prompt = Path(arguments.file).read_text() if arguments.file else arguments.prompt
    if not prompt:
        print("asrkf run: give a prompt: -p TEXT or -f FILE", file=sys.stderr)
        return 2
    llm = Llama(
        str(resolve_model(arguments.model)),
        n_ctx=arguments.n_ctx,
        n_gpu_layers=arguments.n_gpu_layers,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        seed=arguments.seed,
        kv_policy=arguments.kv_policy,
        kv_pool=arguments.kv_pool,
        verbose=arguments.verbose,
    )
    bar = prompt_progress(llm, "reading the prompt")
    began = time.perf_counter()
    first: Optional[float] = None
    n_tokens = 0
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "stream": True}
    pieces: Any  # its type depends on "stream"
    if arguments.chat:
        pieces = llm.create_chat_completion(messages=[{"role": "user", "content": prompt}], **options)
    else:
        pieces = llm.create_completion(prompt, **options)
    for piece in pieces:
        if first is None:
            first = time.perf_counter()
            bar.close()
        choice = piece["choices"][0]
        text = choice["delta"].get("content", "") if arguments.chat else choice["text"]
        n_tokens += bool(text)
        print(text, end="", flush=True)
    ended = time.perf_counter()
    stats = llm.kv_stats()
    print(f"\n\n{summary(stats)}", file=sys.stderr)
    if first is not None and n_tokens > 1:
        print(f"prompt read in {first - began:.2f} s, then {(n_tokens - 1) / (ended - first):.1f} tok/s", file=sys.stderr)
    llm.close()
    return 0


def devices() -> list[str]:
    """Names of ggml's devices. (llama_supports_gpu_offload() is true for every build that has RPC.)"""
    ggml = ctypes.CDLL(str(_native.LIBRARY))  # a handle finds the symbols of its dependencies, too
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    ggml.ggml_backend_dev_name.argtypes, ggml.ggml_backend_dev_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    return [ggml.ggml_backend_dev_name(ggml.ggml_backend_dev_get(i)).decode() for i in range(ggml.ggml_backend_dev_count())]


def info(arguments: argparse.Namespace) -> int:
    import llama_cpp

    from . import __version__

    print(f"asrkf-gguf {__version__}, libllama from {_native.LIBRARY_FOLDER}")
    print(f"devices: {', '.join(devices())}")
    print(llama_cpp.llama_print_system_info().decode().strip())
    print(f"policies: {', '.join(POLICIES)}")
    print("keys (kv_policy=\"asrkf,key=value,...\", FreezeConfig(key=value), LLAMA_KV_POLICY):")
    defaults = FreezeConfig().resolved()
    for row in _native.config_table():
        print(f"  {row['name']:<14} {defaults.get(row['name'], ''):<10} {row['doc']}{' [' + row['choices'] + ']' if row['choices'] else ''}")
    if arguments.model:
        path = resolve_model(arguments.model)
        print(f"{path.name}: bytes of K and V by pool, and of the full cache")
        for kind in ("F16", "Q8_0", "Q4_0"):
            token = kv_bytes_per_token(path, kind)
            sizes = ", ".join(f"{cells}: {cells * token / MIB:.1f} MiB" for cells in (1024, 2048, 4096, 8192, 32768))
            print(f"  {kind:<5} {token} bytes a token; {sizes}")
    return 0


def make_parser(command: str) -> argparse.ArgumentParser:
    """The command line, with the options of `bench` and `serve` only for them: both need packages that nothing else does."""
    parser = argparse.ArgumentParser(prog="asrkf", description=__doc__)
    version = _native.ffi.string(_native.lib.asrkf_version()).decode()
    parser.add_argument("--version", action="version", version=f"asrkf {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="generate text, streaming, with the cache's figures at the end")
    runner.add_argument("model", help="path of a GGUF, smollm2, or hf:OWNER/REPO/FILE.gguf")
    runner.add_argument("-p", "--prompt", help="the prompt")
    runner.add_argument("-f", "--file", help="a file with the prompt")
    runner.add_argument("-c", "--n-ctx", type=int, default=8192, help="context, tokens (default 8192)")
    runner.add_argument("-n", "--max-tokens", type=int, default=200, help="tokens to generate (default 200)")
    runner.add_argument("-t", "--threads", type=int, default=None)
    runner.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    runner.add_argument("--temperature", type=float, default=0.0)
    runner.add_argument("--seed", type=int, default=1)
    runner.add_argument("--chat", action="store_true", help="use the model's chat template")
    runner.add_argument("--kv-policy", default="asrkf", help='"full", a preset, or "name,key=value,..." (default asrkf)')
    runner.add_argument("--kv-pool", type=pool_size, help="auto (what fits the device; the default), cells, part of n_ctx, or bytes")
    runner.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's log")
    runner.set_defaults(function=run)
    shower = commands.add_parser("info", help="what this build can do, and what a model's cache needs")
    shower.add_argument("model", nargs="?", help="path of a GGUF, smollm2, or hf:OWNER/REPO/FILE.gguf")
    shower.set_defaults(function=info)
    planner = commands.add_parser("plan", help="does a model fit the device, or a card of a given size, and with which cache")
    add_plan_arguments(planner)
    planner.set_defaults(function=plan_main)
    calibrator = commands.add_parser("calibrate", help="measure a model's layers, for layers=two and layers=each")
    calibrate.add_arguments(calibrator)
    calibrator.set_defaults(function=calibrate.main)
    bencher = commands.add_parser("bench", help="quality and needles of any GGUF against the full cache")
    if command == "bench":
        from . import bench

        bench.add_arguments(bencher)
        bencher.set_defaults(function=bench.main)
    server = commands.add_parser("serve", help="an OpenAI-compatible server; pip install \"asrkf-gguf[serve]\"")
    if command == "serve":
        from . import serve

        serve.add_arguments(server)
        server.set_defaults(function=serve.main)
    return parser


def main(argv: Optional[list[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    if command == "serve":  # llama_cpp.server writes its options with _, we with -
        argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument) for argument in argv]
    logging.basicConfig(format="asrkf: %(message)s")
    logging.getLogger("asrkf_gguf").setLevel(logging.INFO)
    try:
        arguments = make_parser(command).parse_args(argv)
        return arguments.function(arguments)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"asrkf {command}: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whoever wrote it
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
