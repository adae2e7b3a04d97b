"""Texts that can be had on any machine; imports nothing of ours."""

from __future__ import annotations

import pydoc_data.topics
import re


def topics_text() -> str:
    """The language reference as plain text (460,000 characters on Python 3.11): technical English, with every CPython."""
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
