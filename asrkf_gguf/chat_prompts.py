"""The prompt that a model's chat template makes of messages: its tokens, and which of them are whose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import llama_cpp

Messages = Sequence[Any]
"""As create_chat_completion() takes them: dicts with role and content."""


class _Made(Exception):
    """A prompt is ready: nothing is computed with it."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens


class _PromptOnly:
    """Stands for a Llama where a chat handler wants one: the same tokenizer and metadata, but its completion only hands the prompt out."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Any, **_: Any) -> None:
        if not isinstance(prompt, str):  # some handlers leave the tokens to the completion
            raise _Made(list(prompt))


def chat_tokens(llm: llama_cpp.Llama, messages: Messages) -> list[int]:
    """What create_chat_completion() would read; ValueError if the template refuses these messages."""
    try:
        llama_cpp.Llama.create_chat_completion(_PromptOnly(llm), messages=list(messages))  # type: ignore[arg-type]
    except _Made as made:
        return made.tokens
    raise ValueError("the chat handler of this model makes no prompt of tokens")


def chat_span(llm: llama_cpp.Llama, messages: Messages, index: int) -> tuple[int, int]:
    """Positions [begin, end) of a message: from where its text may begin to where the next message's may."""
    index = range(len(messages))[index]
    return _begin_of_next(llm, messages[:index]) if index else 0, _begin_of_next(llm, messages[: index + 1])


def _begin_of_next(llm: llama_cpp.Llama, messages: Messages) -> int:
    """How many tokens two chats share that go on differently after these messages."""
    role = "assistant" if messages[-1]["role"] == "user" else "user"
    one, other = (chat_tokens(llm, [*messages, {"role": role, "content": text}]) for text in ("a", "b"))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
