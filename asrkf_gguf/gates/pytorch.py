"""PyTorch, which nothing else in the package needs."""

from __future__ import annotations

import importlib
from typing import Any


def import_torch() -> Any:
    """RuntimeError with the remedy without it."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise RuntimeError(f"gates are made with PyTorch, which cannot be imported ({error}): pip install torch") from error
