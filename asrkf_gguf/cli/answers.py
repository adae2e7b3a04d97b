"""One answer of a model on the terminal: streamed, ended by Control-C, and its figures in one line."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Optional, Union

from ..llama import Llama
from ..progress import PromptBar
from ..stats import MIB, KVStats

Prompt = Union[str, list[Any]]
"""A text to go on with, or the messages of a chat: dicts with role and content."""


class Ended(Exception):
    """Control-C while a prompt was read."""


class EndsOnControlC:
    """In its with block Control-C sets `is_asked` and stops nothing: an answer looks at it where it can end. Elsewhere than in the
    main thread, where Python handles no signals, it does nothing."""

    is_asked = False

    def __enter__(self) -> EndsOnControlC:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, _number: int, _frame: Optional[FrameType]) -> None:
        self.is_asked = True

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)


@dataclass(frozen=True)
class Answer:
    """What was said, and how fast."""

    text: str
    finish_reason: str
    """Of llama_cpp: "stop" or "length"; "interrupted" by Control-C."""
    prompt_tokens: int
    cached_tokens: int
    """Of these, what the cache held already."""
    read_tokens: int
    """And what was read: the others, unless Control-C came."""
    answer_tokens: int
    prompt_seconds: float
    """Until the first token was there."""
    answer_seconds: float
    """From then on."""

    def line(self, stats: KVStats, n_ctx: int) -> str:
        """Tokens, tokens a second, pool, frozen, missed attention."""
        read = f"{self.read_tokens} tokens read"
        if self.read_tokens > 1:
            read += f" at {self.read_tokens / self.prompt_seconds:.1f} tok/s"
        if self.cached_tokens:
            read += f" ({self.cached_tokens} were in the cache)"
        said = f"{self.answer_tokens} generated"
        if self.answer_tokens > 1:
            said += f" at {(self.answer_tokens - 1) / self.answer_seconds:.1f} tok/s"
        interrupted = "interrupted; " if self.finish_reason == "interrupted" else ""
        return f"{interrupted}{read}, {said}; {pool_line(stats, n_ctx)}"


def pool_line(stats: KVStats, n_ctx: int) -> str:
    """Pool, frozen tokens and missed attention, a few words."""
    missed = stats.missed_attention_ratio if stats.frozen_cells else max(0.0, stats.missed_attention_ratio)
    return (
        f"pool {stats.pool_cells} of {n_ctx} cells, {stats.frozen_cells} tokens frozen, "
        f"missed attention {'not measured' if missed < 0 else f'{missed:.1%}'}"
    )


def summary(stats: KVStats) -> str:
    """The figures of a cache, a few lines."""
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


def answer(llm: Llama, prompt: Prompt, show: Callable[[str], None], **options: Any) -> Answer:
    """The model's answer, each piece shown as it comes, with a bar while the prompt is read; options of create_completion().

    Control-C ends it after the batch or the token that is being computed: what was said by then is the answer. ValueError if the
    prompt does not fit the context; KVError if the cache refuses.
    """
    tokens = prompt_tokens(llm, prompt)
    in_cache = min(llm.longest_token_prefix(llm.input_ids[: llm.n_tokens].tolist(), tokens), len(tokens) - 1)
    pieces: list[str] = []
    bar, began = PromptBar(), time.perf_counter()
    first: Optional[float] = None
    reason = ""
    with EndsOnControlC() as control:

        def progress(done: int, total: int) -> None:
            bar(done, total)
            if control.is_asked:
                raise Ended

        llm.progress = progress
        chunks = stream(llm, prompt, options)
        try:
            for text, finish_reason in chunks:
                first = first or time.perf_counter()
                pieces.append(text)
                show(text)
                reason = finish_reason or reason
                if control.is_asked and not finish_reason:
                    raise Ended
        except Ended:
            reason = "interrupted"
        finally:
            llm.progress = None
            bar.close()
            chunks.close()
    ended = time.perf_counter()
    n_said = max(0, llm.n_tokens - len(tokens) + (first is not None and reason != "stop"))  # the last token sampled is not evaluated
    n_read = min(llm.n_tokens, len(tokens)) - in_cache
    return Answer("".join(pieces), reason, len(tokens), in_cache, n_read, n_said, (first or ended) - began, ended - (first or ended))


def prompt_tokens(llm: Llama, prompt: Prompt) -> list[int]:
    """What will be read; ValueError, with what would work, if it does not leave room for an answer."""
    tokens = llm.tokenize(prompt.encode(), special=True) if isinstance(prompt, str) else llm.chat_tokens(prompt)
    if len(tokens) >= llm.n_ctx():
        raise ValueError(f"{len(tokens)} tokens do not fit into a context of {llm.n_ctx()}: give -c {len(tokens) + 256} or more")
    return tokens


def stream(llm: Llama, prompt: Prompt, options: dict[str, Any]) -> Generator[tuple[str, Optional[str]], None, None]:
    """Pieces of an answer, each with its finish reason if it is the last."""
    chunks: Any  # its type depends on "stream"
    if isinstance(prompt, str):
        chunks = llm.create_completion(prompt, stream=True, **options)
    else:
        chunks = llm.create_chat_completion(messages=prompt, stream=True, **options)
    for chunk in chunks:
        choice = chunk["choices"][0]
        text = choice["text"] if isinstance(prompt, str) else choice["delta"].get("content")
        if text or choice["finish_reason"]:
            yield text or "", choice["finish_reason"]
