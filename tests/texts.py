"""Texts that can be had on any machine; imports nothing of ours."""

from __future__ import annotations

import pydoc_data.topics
import re


def topics_text() -> str:
    """The language reference as plain text (460,000 characters on Python 3.11): technical English, with every CPython."""
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


def with_early_word(text: str, begin: int, n_characters: int, word: str) -> str:
    """A piece of text with a word to remember a fifth into it, and at its end the question for it: SmolLM2's full cache answers
    it right with the words that the tests ask for."""
    piece, early = text[begin : begin + n_characters], n_characters // 5
    fact = f'\n\nThe secret word is "{word}". Remember: the secret word is "{word}".\n\n'
    return f'{piece[:early]}{fact}{piece[early:]}\n\nThe secret word is "'
