"""What the gates learn: KVzip's score of a token (arXiv 2505.23416), the largest attention it gets when the model repeats the text.

A document is read once. Then each chunk of it is repeated behind the whole: an instruction, the header of an answer if the model has a
chat template, and the chunk's own tokens. Its queries are weighed over a reduced set of keys: the document's first four tokens, the
chunk, and the repetition itself. So a chunk's scores do not depend on how long the document is, and cost grows with its length only.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import llama_cpp
import numpy as np

from .graph import Attention, Session

CHUNK_TOKENS, SINK_TOKENS = 2000, 4
MOST_CONTEXT = 16384  # tokens: it bounds the cache, and a document's length
LEAST_CHUNK = 64
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with "
_TAIL_TOKENS = 8  # of the chunk before, which a later instruction names


def tokenize(model: Any, text: str, special: bool = False) -> list[int]:
    """Without tokens at the begin and end; ValueError if the model has no tokenizer."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ValueError("the model has no tokenizer")
    data = text.encode()
    out = (llama_cpp.llama_token * (len(data) + 8))()
    return list(out[: max(0, llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), False, special))])


def answer_header(model: Any) -> str:
    """What a chat template writes behind a user's last word, before the answer; empty without a template that llama.cpp knows."""
    template = llama_cpp.llama_model_chat_template(model, None)
    if not template:
        return ""
    word = b"WORD"
    message = llama_cpp.llama_chat_message(role=b"user", content=word)
    out = ctypes.create_string_buffer(4096)
    n = llama_cpp.llama_chat_apply_template(template, ctypes.byref(message), 1, True, out, len(out))
    text = out.raw[: max(0, min(n, len(out)))]
    return text[text.rindex(word) + len(word) :].decode(errors="replace") if word in text else ""


@dataclass(frozen=True)
class Instructions:
    """By which a model is told to repeat a chunk, as tokens."""

    first: list[int]
    later: list[int]
    header: list[int]

    @classmethod
    def of(cls, model: Any) -> Instructions:
        return cls(tokenize(model, _FIRST), tokenize(model, _LATER), tokenize(model, answer_header(model), special=True))

    @property
    def most_tokens(self) -> int:
        return max(len(self.first), len(self.later) + _TAIL_TOKENS) + len(self.header)

    def before(self, document: Sequence[int], begin: int) -> list[int]:
        """The chunk that begins there."""
        return [*([*self.later, *document[begin - _TAIL_TOKENS : begin]] if begin else self.first), *self.header]


@dataclass(frozen=True)
class Plan:
    """How texts are cut for a model."""

    chunk_tokens: int
    document_tokens: int
    n_ctx: int

    @classmethod
    def of(cls, n_ctx_train: int, instruction_tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> Plan:
        """A document is whole chunks, and leaves room for the repetition of one; ValueError if the model's context has no room."""
        most = min(n_ctx_train, MOST_CONTEXT) - instruction_tokens
        chunk = min(chunk_tokens, most // 2)
        if chunk < LEAST_CHUNK:
            raise ValueError(f"the model was trained on {n_ctx_train} tokens: too few to read a text and repeat it")
        document = (most - chunk) // chunk * chunk
        return cls(chunk, document, document + chunk + instruction_tokens)


def chunks_of(n_tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """[begin, end) of equally long chunks, so that scores can be compared."""
    edges = np.linspace(0, n_tokens, -(-n_tokens // chunk_tokens) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))


def received(queries: np.ndarray, keys: np.ndarray, n_scored: int, scale: float, softcap: float = 0.0) -> np.ndarray:
    """The largest weight that each of the first n_scored keys gets from a step's queries: [n_scored, KV heads].

    queries [tokens, KV heads, group, head]; keys [keys, KV heads, head], of which the last are the queries' own, so that each query
    sees its own and those before.
    """
    n, n_heads, group, head = queries.shape
    ahead = np.triu(np.full((n, n), -np.inf, np.float32), 1)[:, None]
    weights = np.empty((n_scored, n_heads), np.float32)
    for h in range(n_heads):
        logits = (queries[:, h].reshape(n * group, head) * np.float32(scale)) @ keys[:, h].T
        if softcap:
            logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
        logits.reshape(n, group, -1)[:, :, -n:] += ahead
        logits -= logits.max(1, keepdims=True)
        scored = logits[:, :n_scored].copy()
        scored -= np.log(np.exp(logits, out=logits).sum(1, keepdims=True))
        weights[:, h] = np.exp(scored.max(0))
    return weights


def score_document(
    session: Session, document: Sequence[int], layers: Sequence[int], instructions: Instructions, chunk_tokens: int,
    progress: Optional[Callable[[int], None]] = None,
) -> dict[int, np.ndarray]:  # fmt: skip
    """By layer, of a document that the session has just read, and that it holds alone: float32 [tokens, KV heads], between 0 and 1."""
    found: dict[int, np.ndarray] = {}
    n = len(document)
    wanted = set(layers)
    for begin, end in chunks_of(n, chunk_tokens):
        n_sinks = min(SINK_TOKENS, begin)

        def see(seen: Attention, begin: int = begin, end: int = end, n_sinks: int = n_sinks) -> None:
            if seen.il not in wanted:
                return
            queries = seen.queries()
            own_end = session.n_tokens + len(queries)
            keys = np.concatenate([seen.keys(begin, end), seen.keys(0, n_sinks), seen.keys(n, own_end)])
            weights = received(queries, keys, end - begin, seen.scale, seen.softcap)
            scores = found.setdefault(seen.il, np.zeros((n, seen.n_heads_kv), np.float32))[begin:end]
            np.maximum(scores, weights, out=scores)

        session.on_attention = see
        try:
            session.decode([*instructions.before(document, begin), *document[begin:end]], progress)
        finally:
            session.on_attention = None
        session.keep(n)
    return found
