"""The first line of `asrkf run` and `asrkf serve`: what runs."""

from __future__ import annotations

from pathlib import Path

from .llama import Llama


def opening_line(llm: Llama) -> str:
    """Model, policy, pool, and whether the model is calibrated."""
    stats = llm.kv_stats()
    cache = "upstream's cache" if stats.policy == "full" else f"policy {stats.policy}, pool {stats.pool_cells} of {llm.n_ctx()} cells"
    return f"{Path(llm.model_path).name}: {cache}, {calibration_words(llm)}"


def calibration_words(llm: Llama) -> str:
    config, stats = llm.kv_config(), llm.kv_stats()
    if config is not None and config.calibration not in (None, "off"):
        return f"calibrated ({config.calibration})"
    if config is None or config.score != "attention":
        return "which needs no calibration"
    if stats.pool_cells >= llm.n_ctx():
        return "nothing will be frozen, so it needs no calibration"
    return "not calibrated: budgets and scoring layers are a guess by depth; asrkf calibrate measures them"
