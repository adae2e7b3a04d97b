"""A text of about 6,000 tokens with one fact planted in it, and a question about that fact at its end: read and answered by
upstream's full cache and by a pool of a quarter. In the pool the fact lies far outside the window, so it is frozen while
the text is read, and must be recalled to be answered.

    scripts/demo [MODEL.gguf | smollm2 | hf:OWNER/REPO:QUANT] [--text FILE] [--fact F --question Q] [--depth 0.4] [--pool 2048]
    scripts/demo --equal-bytes     # also upstream's caches of fewer bits, and pools of a third of F16's bytes: minutes more
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from tabulate import tabulate

from asrkf_gguf import KVStats, Llama, resolve_model
from asrkf_gguf.cli.run import pool_size
from asrkf_gguf.progress import PromptBar
from asrkf_gguf.stats import MIB
from asrkf_gguf.texts import topics

N_CTX = 8192
TEXT_TOKENS = 5900
F16, Q8_0, Q4_0 = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q4_0
EQUAL_BYTES = {
    "upstream, Q8_0": {"kv_policy": "full", "type_k": Q8_0, "type_v": Q8_0},
    "upstream, K Q8_0, V Q4_0": {"kv_policy": "full", "type_k": Q8_0, "type_v": Q4_0},
    "upstream, Q4_0": {"kv_policy": "full", "type_k": Q4_0, "type_v": Q4_0},
    "asrkf, 33 %, Q8_0": {"kv_policy": "asrkf", "kv_pool": "33%", "type_k": Q8_0, "type_v": Q8_0},
    "asrkf, 33 %, F16": {"kv_policy": "asrkf", "kv_pool": "33%", "type_k": F16, "type_v": F16},
}
FACT = "The telephone number of the Lindholm lighthouse is 48291. The lighthouse keeper of Lindholm answers at 48291."
QUESTION = "What is the telephone number of the Lindholm lighthouse?"


@dataclass
class Prompt:
    """The parts of the prompt as tokens; the fact's positions are [begin, end)."""

    before: list[int]
    fact: list[int]
    after: list[int]
    question: list[int]

    @property
    def begin(self) -> int:
        return len(self.before)

    @property
    def end(self) -> int:
        return len(self.before) + len(self.fact)


def make_prompt(model: str, text: str, n_tokens: int, fact: str, question: str, depth: float) -> Prompt:
    """The text with the fact after the first sentence that ends behind `depth` of it, then the question."""
    llm = Llama(model, n_ctx=256, verbose=False)

    def tokens(part: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return llm.tokenize(part.encode(), add_bos=add_bos, special=special)

    shown = llm.detokenize(tokens(text[: 12 * n_tokens])[:n_tokens]).decode(errors="ignore")
    at = shown.find(". ", int(depth * len(shown))) + 1
    head, tail = tokens("", add_bos=True), tokens(f"\n\nQuestion: {question}\nAnswer:")
    if "smollm" in model.lower():  # its chat template
        head = tokens("<|im_start|>user\n", special=True)
        tail = tokens(f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n", special=True)
    prompt = Prompt([*head, *tokens(shown[:at])], tokens(f" {fact}"), tokens(shown[at:]), tail)
    llm.close()
    return prompt


@dataclass
class Run:
    """What one side did."""

    answer: str
    prefill_rate: float
    decode_rate: float
    fact_before: str
    """How many of the fact's tokens were frozen before the last batch of the prompt, and when it had been read."""
    fact_after: str
    stats: KVStats


def frozen_part(llm: Llama, prompt: Prompt) -> str:
    """Of the fact's tokens in all layer groups, how many are frozen."""
    groups = llm.kv_stats().groups
    states = [llm.kv_tokens(group=index) for index in range(len(groups))]
    frozen = sum(state == "frozen" for tokens in states for _, state in tokens[prompt.begin : prompt.end])
    total = len(states) * len(prompt.fact)
    return f"{frozen / total:.0%} frozen" if total else "active"


def read_and_answer(label: str, model: str, prompt: Prompt, max_tokens: int, **cache: object) -> Run:
    """One side: reads text and question, answers with one line, greedily."""
    llm = Llama(model, n_ctx=N_CTX, n_gpu_layers=-1, n_threads=None, verbose=False, seed=1, **cache)
    whole = [*prompt.before, *prompt.fact, *prompt.after, *prompt.question]
    fact = []  # after each batch
    show = PromptBar(f"  {label} reads {len(whole)} tokens")

    def progress(done: int, total: int) -> None:
        show(done, total)
        if done >= prompt.end:
            fact.append(frozen_part(llm, prompt))

    llm.progress = progress
    began = time.perf_counter()
    llm.eval(whole)
    read = time.perf_counter()
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = llm.sample(temp=0.0)
        if token == llm.token_eos() or b"\n" in llm.detokenize([token]):  # a small model says a right answer twice
            break
        tokens.append(token)
        llm.eval([token])
    done = time.perf_counter()
    stats = llm.kv_stats()
    answer = llm.detokenize(tokens).decode(errors="replace").strip()
    llm.close()
    return Run(answer, len(whole) / (read - began), len(tokens) / (done - read), fact[-2], fact[-1], stats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file; default: Python's language reference, from the standard library")
    parser.add_argument("--fact", default=FACT, help="what is planted in the text")
    parser.add_argument("--question", default=QUESTION, help="what is asked at its end")
    parser.add_argument("--depth", type=float, default=0.4, help="where the fact stands, 0 (begin) to 1 (end); default 0.4")
    parser.add_argument("--pool", type=pool_size, default=2048, help="cells, part of n_ctx (0.25) or bytes (45MiB)")
    parser.add_argument("--tokens", type=int, default=TEXT_TOKENS, help=f"of the text (default {TEXT_TOKENS})")
    parser.add_argument("--equal-bytes", action="store_true", help="also upstream's caches of fewer bits, and pools of a third of F16's bytes")
    parser.add_argument("--max-tokens", type=int, default=120)
    arguments = parser.parse_args()

    model = str(resolve_model(arguments.model))
    text = arguments.text.read_text() if arguments.text else topics()
    prompt = make_prompt(model, text, arguments.tokens, arguments.fact, arguments.question, arguments.depth)
    n_text = prompt.end + len(prompt.after)
    print(f"{Path(model).name} reads a text of {n_text} tokens. At positions {prompt.begin} to {prompt.end - 1} it says:")
    print(f"  {arguments.fact}\nThen it is asked:\n  {arguments.question}")
    sides = {
        "upstream's full cache": {"kv_policy": "full"},
        f"asrkf, pool {arguments.pool}": {"kv_policy": "asrkf", "kv_pool": arguments.pool},
        **(EQUAL_BYTES if arguments.equal_bytes else {}),
    }
    runs = {name: read_and_answer(name, model, prompt, arguments.max_tokens, **cache) for name, cache in sides.items()}
    for name, run in runs.items():
        print(f"\n[{name}]\n{run.answer}")
    figures = {
        "context, tokens": lambda run: run.stats.tokens,
        "pool, cells": lambda run: run.stats.pool_cells,
        "their type": lambda run: run.stats.type_k if run.stats.type_k == run.stats.type_v else f"{run.stats.type_k}/{run.stats.type_v}",
        "the fact, before the question": lambda run: run.fact_before,
        "the fact, at the question": lambda run: run.fact_after,
        "device KV, MiB": lambda run: f"{run.stats.device_kv_bytes / MIB:.1f}",
        "device index, MiB": lambda run: f"{run.stats.device_index_bytes / MIB:.1f}",
        "host KV, MiB": lambda run: f"{run.stats.host_kv_bytes / MIB:.1f}",
        "prefill, tok/s": lambda run: f"{run.prefill_rate:.0f}",
        "decode, tok/s": lambda run: f"{run.decode_rate:.1f}",
        "frozen cells": lambda run: run.stats.frozen_cells,
        "restores": lambda run: sum(run.stats.restores_total.values()),
    }
    print()
    print(tabulate([[label, *map(figure, runs.values())] for label, figure in figures.items()], ["", *runs], disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
