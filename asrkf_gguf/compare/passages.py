"""What every side reads in a round: a passage of the text, with facts hidden in it, and questions about them for its end."""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp

from ..bench.measure import cut_passages
from ..bench.needles import ANSWER_TOKENS
from ..bench.sides import CELLS
from ..llama import Llama
from ..tasks import Needle, make_needles

TASK, QUESTIONS = "five-facts", 5
GRAIN_TOKENS = 64  # depths are multiples of it
PARTS = (0.25, 0.5, 1.0)  # of the context, at which is decoded


@dataclass(frozen=True)
class Passage:
    """Tokens that are read up to a depth, decoded from there, read on to the next depth, and so on."""

    tokens: list[int]
    """The last one is only predicted."""
    depths: tuple[int, ...]
    questions: list[tuple[list[int], str]]
    """Tokens that follow the passage, and the answer."""


def cut(llm: Llama, name: str, text: str, n_ctx: int, positions: int, rounds: int) -> list[Passage]:
    """One passage a round, which fills the context but for a question and its answer. ValueError if context or text is too short."""
    if llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(llm.model)) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ValueError(f"{llm.model_path} has no tokenizer, so it cannot read a text: take a GGUF that has one")
    needles = [make_needles(TASK, QUESTIONS, seed=round_)[0] for round_ in range(rounds)]
    questions = [_questions(llm, needle) for needle in needles]
    depths = _depths(n_ctx, positions, max(len(tokens) for asked in questions for tokens, _ in asked))
    raw = cut_passages(llm, name, text, depths[-1] + positions, rounds, may_overlap=True)
    return [Passage(_hide(llm, tokens, needle), depths, asked) for tokens, needle, asked in zip(raw, needles, questions, strict=True)]


def _questions(llm: Llama, needle: Needle) -> list[tuple[list[int], str]]:
    return [(llm.tokenize(f"\n\n{question} {stem}".encode(), add_bos=False), answer) for question, stem, (answer,) in needle.questions]


def _depths(n_ctx: int, positions: int, question_tokens: int) -> tuple[int, ...]:
    n_behind = positions + question_tokens + ANSWER_TOKENS
    n_read, least = n_ctx - n_behind, 4 * (positions + GRAIN_TOKENS)
    if n_read < least:
        needed = -(-(least + n_behind) // CELLS) * CELLS
        raise ValueError(f"-c {n_ctx} is too short to decode {positions} tokens at {len(PARTS)} depths: -c {needed} or more, or fewer --positions")
    return tuple(int(n_read * part) // GRAIN_TOKENS * GRAIN_TOKENS for part in PARTS)


def _hide(llm: Llama, tokens: list[int], needle: Needle) -> list[int]:
    """As many tokens, with the needle's sentences among them."""
    hidden = sum(len(llm.tokenize(sentence.encode(), add_bos=False)) for _, sentence in needle.sentences)
    haystack = llm.detokenize(tokens[: len(tokens) - hidden]).decode(errors="ignore")
    return (llm.tokenize(needle.hide(haystack).encode(), add_bos=True) + tokens[len(tokens) - hidden :])[: len(tokens)]
