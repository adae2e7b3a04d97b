"""`asrkf run`: generate text, streaming, with the cache's figures at the end."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from ..config import PoolSize
from ..llama import Llama
from ..models import resolve_model
from ..stats import MIB, KVStats


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path of a GGUF, smollm2, or hf:OWNER/REPO:QUANT")
    parser.add_argument("-p", "--prompt", help="the prompt")
    parser.add_argument("-f", "--file", help="a file with the prompt")
    parser.add_argument("-c", "--n-ctx", type=int, default=8192, help="context, tokens (default 8192)")
    parser.add_argument("-n", "--max-tokens", type=int, default=200, help="tokens to generate (default 200)")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--kv-policy", default="asrkf", help='"full", a preset, or "name,key=value,..." (default asrkf)')
    parser.add_argument("--kv-pool", type=pool_size, help="auto (what fits the device; the default), cells, part of n_ctx, or bytes")
    parser.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's log")


def main(arguments: argparse.Namespace) -> int:
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
