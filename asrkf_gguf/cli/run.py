"""`asrkf run`: an answer to a prompt, or without one a chat; the answer on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Optional

from ..config import PoolSize
from ..llama import Llama
from ..models import MODEL_FORMS, resolve_model
from ..opening import opening_line
from ..traces import tracing
from .answers import Prompt, answer
from .chat import Chat, say

PLAIN_TOKENS = 200  # of an answer without a chat template, which need not come to an end


def pool_size(text: str) -> PoolSize:
    """A pool as the configuration takes it: whole cells stay an int, the rest is for the engine to read."""
    return int(text) if text.lstrip("-").isdigit() else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Answer a prompt: -p, -f or what is piped in. Without any of them, chat. Control-C ends an answer."
    parser.add_argument("model", help=MODEL_FORMS)
    parser.add_argument("-p", "--prompt", help="the prompt; with -f: what to ask of the file")
    parser.add_argument("-f", "--file", help="a file with the prompt, - for stdin")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template for the prompt")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of a chat; with a prompt it means --chat, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, seconds, and all figures of the cache")
    parser.add_argument("-c", "--n-ctx", type=int, default=8192, help="context, tokens (default 8192)")
    parser.add_argument("-n", "--max-tokens", type=int, help=f"tokens of an answer at most (default {PLAIN_TOKENS}; in a chat what fits)")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens in a step (default 512): fewer need smaller buffers")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kv-policy", default="asrkf", help='"full", a preset, or "name,key=value,..." (default asrkf)')
    parser.add_argument("--kv-pool", type=pool_size, help="auto (what fits the device; the default), cells, part of n_ctx, or bytes")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="record the steps (the newest 65,536) as CSV, for asrkf plot FILE")
    parser.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's log")


def read_prompt(arguments: argparse.Namespace) -> Optional[str]:
    """What is asked; None for a chat. ValueError if it is empty, or there is none where one is needed."""
    file = arguments.file or (None if arguments.prompt or sys.stdin.isatty() else "-")
    parts = []
    if file:  # stdin as a file: what is no UTF-8 is read all the same
        with open(sys.stdin.fileno() if file == "-" else file, encoding="utf-8", errors="replace", closefd=file != "-") as given:
            parts.append(given.read())
    prompt = "\n\n".join([part for part in [*parts, arguments.prompt] if part])
    if not prompt and (file or arguments.prompt is not None):
        raise ValueError("the prompt is empty: give -p TEXT, -f FILE or text on stdin; on a terminal none of them starts a chat")
    if not prompt and arguments.json:
        raise ValueError("--json prints one answer: give -p TEXT, -f FILE or text on stdin")
    return prompt or None


def load(arguments: argparse.Namespace) -> Llama:
    return Llama(
        str(resolve_model(arguments.model)),
        n_ctx=arguments.n_ctx,
        n_gpu_layers=arguments.n_gpu_layers,
        n_batch=max(512, arguments.ubatch),
        n_ubatch=arguments.ubatch,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        seed=arguments.seed,
        kv_policy=arguments.kv_policy,
        kv_pool=arguments.kv_pool,
        verbose=arguments.verbose,
    )


def main(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments)
    is_plain = prompt is not None and not arguments.chat and arguments.system is None
    n_most = PLAIN_TOKENS if arguments.max_tokens is None and is_plain else arguments.max_tokens
    options = {"max_tokens": n_most, "temperature": arguments.temperature}
    llm = load(arguments)
    say(opening_line(llm))
    with contextlib.closing(llm), tracing(llm, arguments.trace) if arguments.trace else contextlib.nullcontext():
        if not is_plain and "tokenizer.chat_template" not in llm.metadata:
            say(f"this model brings no chat template: that of {llm.chat_format} is used; without --chat and --system, -p goes on with a plain text")
        if prompt is None:
            return Chat(llm, arguments.system, options).run()
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        return answer_once(llm, prompt if is_plain else [*system, {"role": "user", "content": prompt}], options, arguments.json)


def answer_once(llm: Llama, prompt: Prompt, options: dict[str, Any], as_json: bool) -> int:
    """Print the answer and its figures; the exit status, of Control-C if it came."""
    said = answer(llm, prompt, lambda text: None if as_json else print(text, end="", flush=True), **options)
    stats = llm.kv_stats()
    if as_json:
        print(json.dumps({**dataclasses.asdict(said), "n_ctx": llm.n_ctx(), "kv": dataclasses.asdict(stats)}))
    else:
        print()
        say(f"[{said.line(stats, llm.n_ctx())}]")
    return 130 if said.finish_reason == "interrupted" else 0
