"""How far a prompt is read: what Llama(progress=...) takes, and the bar that it shows for True."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


class PromptBar:
    """A Progress that shows a bar on stderr, where that is a terminal."""

    def __init__(self, label: str = "reading the prompt") -> None:
        self._label = label
        self._bar: Optional[tqdm] = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None or done == 0:  # the last prompt may have ended by an error
            self.close()
            self._bar = tqdm(desc=self._label, total=total, unit="tok", disable=None, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
