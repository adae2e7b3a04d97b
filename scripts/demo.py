"""One prompt of about 6,000 tokens and a question about it, read by upstream's full cache and by a pool of a quarter.

    scripts/demo [MODEL.gguf | smollm2 | hf:OWNER/REPO/FILE.gguf] [--text FILE] [--question Q] [--pool 2048]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from asrkf_gguf import KVStats, Llama, resolve_model
from asrkf_gguf.cli import pool_size, prompt_progress
from asrkf_gguf.stats import MIB
from asrkf_gguf.texts import topics

N_CTX = 8192


def read_and_answer(label: str, model: str, prompt: list[int], max_tokens: int, **cache: object) -> tuple[str, dict[str, float], KVStats]:
    """The answer (greedy), seconds and rates, and the cache's stats."""
    llm = Llama(model, n_ctx=N_CTX, n_gpu_layers=-1, n_threads=None, verbose=False, seed=1, **cache)
    prompt_progress(llm, f"  {label} reads {len(prompt)} tokens")
    began = time.perf_counter()
    llm.eval(prompt)
    read = time.perf_counter()
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = llm.sample(temp=0.0, repeat_penalty=1.1)
        if token == llm.token_eos():
            break
        tokens.append(token)
        llm.eval([token])
    done = time.perf_counter()
    stats = llm.kv_stats()
    answer = llm.detokenize(tokens).decode(errors="replace").strip()
    llm.close()
    rates = {"prefill": len(prompt) / (read - began), "decode": len(tokens) / (done - read)}
    return answer, rates, stats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file; default: Python's language reference, from the standard library")
    parser.add_argument("--question", default="What does the assert statement do, and when is it switched off?")
    parser.add_argument("--pool", type=pool_size, default=2048, help="cells, part of n_ctx (0.25) or bytes (45MiB)")
    parser.add_argument("--max-tokens", type=int, default=120)
    arguments = parser.parse_args()

    model = str(resolve_model(arguments.model))
    text = arguments.text.read_text() if arguments.text else topics()
    vocabulary = Llama(model, n_ctx=256, verbose=False)
    about = vocabulary.tokenize(text[:60000].encode(), add_bos=False)[:5900]
    head, tail = "", f"\n\nQuestion: {arguments.question}\nAnswer:"
    if "smollm" in model.lower():  # its chat template, around a prompt that is cut by tokens
        head, tail = "<|im_start|>user\n", f"\n\n{arguments.question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = [
        *vocabulary.tokenize(head.encode(), add_bos=not head, special=True), *about,
        *vocabulary.tokenize(tail.encode(), add_bos=False, special=True),
    ]
    vocabulary.close()

    print(f"{Path(model).name}: a text of {len(about)} tokens, and then: {arguments.question}")
    sides = {
        "upstream's full cache": {"kv_policy": "full"},
        f"asrkf, pool {arguments.pool}": {"kv_policy": "asrkf", "kv_pool": arguments.pool},
    }
    results = {name: read_and_answer(name, model, prompt, arguments.max_tokens, **cache) for name, cache in sides.items()}
    for name, (answer, _, _) in results.items():
        print(f"\n[{name}]\n{answer}")

    def row(label: str, value: object) -> None:
        print(f"{label:<26}" + "".join(f"{value(rates, stats):>24}" for _, rates, stats in results.values()))

    print("\n" + " " * 26 + "".join(f"{name:>24}" for name in results))
    row("context, tokens", lambda _, s: s.tokens)
    row("pool, cells", lambda _, s: s.pool_cells)
    row("device KV, MiB", lambda _, s: f"{s.device_kv_bytes / MIB:.1f}")
    row("device index, MiB", lambda _, s: f"{s.device_index_bytes / MIB:.1f}")
    row("host KV, MiB", lambda _, s: f"{s.host_kv_bytes / MIB:.1f}")
    row("prefill, tok/s", lambda r, _: f"{r['prefill']:.0f}")
    row("decode, tok/s", lambda r, _: f"{r['decode']:.1f}")
    row("frozen cells", lambda _, s: s.frozen_cells)
    row("restores", lambda _, s: sum(s.restores_total.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
