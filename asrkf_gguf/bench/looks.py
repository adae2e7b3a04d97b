"""Missed attention and second looks: how well what a token missed tells its loss, and what computing some tokens twice gains.

All but the prompt's last tokens are read by the full cache of a side's type, once for all its pools and sides, and handed over as a
state. So sides differ only by what they do while decoding, and their losses are compared position by position with the first side's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ..divergence import kl_divergence, log_softmax
from ..llama import Llama
from ..models import cache_folder
from ..texts import load_texts
from .measure import cut_passages, decode, feed, last_logits, standard_error
from .records import DESCRIPTION, Table, describe, results_file, run_key
from .sides import REFERENCE, Side, config_text, open_side, parse_side, read_counters, require_frozen

FIGURES = [
    "kl_mean", "kl_se", "kl_p99", "kl_change", "kl_change_se", "missed_mean", "rank_missed_kl", "rank_worst_kl", "rank_entropy_kl", "second_looks",
    "device_bytes", "pool_cells", "moved_bytes_per_token", "processor_seconds_per_token",
]  # fmt: skip
LOOKS = [*DESCRIPTION, "text", "length", "positions", "side", "config", "type", *FIGURES, "run"]


IN_POOL_TOKENS = 64  # last ones of a prompt, read with the pool
PART_TOKENS = 512  # of a prompt, after which its state is kept


class Looks:
    """One text: the full cache's predictions, and each side's against them."""

    def __init__(self, arguments: argparse.Namespace, name: str, text: str) -> None:
        self.arguments, self.name, self.text = arguments, name, text
        self.length, self.positions = arguments.length[0], arguments.positions
        self.folder = cache_folder() / "bench"
        self.folder.mkdir(exist_ok=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def key(self, side: Side, kept: str) -> str:
        return run_key(side, self.length, self.arguments, text=self.digest, positions=self.positions, kept=kept)

    def record(self, side: Side) -> Path:
        return self.folder / f"{self.key(side, 'looks')}.npz"

    def passage(self, llm: Llama) -> list[int]:
        return cut_passages(llm, self.name, self.text, self.length, 1)[0]

    def begin_of_prompt(self, kind: str) -> Any:
        """The state of the full cache of this type. Kept part by part, so that a run that was cut off goes on."""
        side = Side("", type=kind)
        path = self.folder / f"{self.key(side, 'prompt')}.state"
        state = pickle.loads(path.read_bytes()) if path.exists() else None
        n = self.length - self.positions - IN_POOL_TOKENS
        if state is not None and state.n_tokens == n:
            return state
        with contextlib.closing(open_side(side, self.length, self.arguments)) as llm:
            if state is not None:
                llm.load_state(state)
            tokens = self.passage(llm)[:n]
            while llm.n_tokens < n:
                feed(llm, tokens[llm.n_tokens : llm.n_tokens + PART_TOKENS])
                state = llm.save_state()
                part = path.with_suffix(".part")
                part.write_bytes(pickle.dumps(state))
                part.rename(path)
        return state

    def read_prompt(self, llm: Llama, side: Side, tokens: list[int]) -> None:
        llm.load_state(self.begin_of_prompt(side.type))
        feed(llm, tokens[llm.n_tokens : -self.positions - 1])

    def reference(self) -> np.ndarray:
        """Log probabilities of the full cache by position, kept for the next run."""
        path = self.folder / f"{self.key(REFERENCE, 'looks')}.npy"
        if not path.exists():
            with contextlib.closing(open_side(REFERENCE, self.length, self.arguments)) as llm:
                tokens = self.passage(llm)
                self.read_prompt(llm, REFERENCE, tokens)
                rows = np.empty((self.positions, llm.n_vocab()), np.float16)
                decode(llm, tokens, llm.n_tokens, len(tokens) - 1, keep=rows)
            part = path.with_suffix(".part.npy")
            np.save(part, rows)
            part.rename(path)
        return np.load(path, mmap_mode="r")

    def measure(self, side: Side) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """By position KL, what the token missed the first time, entropy and processor seconds; and the side's figures."""
        reference = self.reference()
        columns: dict[str, list[float]] = {name: [] for name in ("kl", "missed", "worst", "entropy", "seconds")}
        with contextlib.closing(open_side(side, self.length, self.arguments)) as llm:
            tokens = self.passage(llm)
            self.read_prompt(llm, side, tokens)
            before = read_counters(llm)
            for token, row in zip(tokens[-self.positions - 1 : -1], reference, strict=True):
                began = time.process_time()
                llm.eval([token])
                logits = last_logits(llm)
                columns["seconds"].append(time.process_time() - began)
                found = log_softmax(logits)
                columns["kl"].append(kl_divergence(log_softmax(np.asarray(row, dtype=np.float64)), found))
                columns["entropy"].append(float(-np.sum(np.exp(found) * found)))
                stats = llm.kv_stats()
                columns["missed"].append(stats.missed_attention_ratio)
                columns["worst"].append(stats.missed_attention_worst_ratio)
            after = read_counters(llm)
            require_frozen(side, self.length, after)
            counted = ("moved_to_host_bytes", "moved_to_device_bytes", "second_looks_total")
            gain = {name: after[name] - before[name] for name in counted}
            figures = {
                "config": config_text(llm), "device_bytes": after["device_bytes"], "pool_cells": after["pool_cells"],
                "second_looks": gain["second_looks_total"],
                "moved_bytes_per_token": (gain["moved_to_host_bytes"] + gain["moved_to_device_bytes"]) / self.positions,
            }  # fmt: skip
        return {name: np.array(values) for name, values in columns.items()}, figures

    def row(self, side: Side, first: Side) -> dict[str, Any]:
        """Measured now, or by an earlier run. first: whose losses the side's are compared with."""
        path = self.record(side)
        if self.arguments.again or not path.exists():
            columns, figures = self.measure(side)
            arrays: dict[str, Any] = {**columns, "figures": np.array(json.dumps(figures))}
            part = path.with_suffix(".part.npz")
            np.savez(part, **arrays)
            part.rename(path)
        with np.load(path) as kept:
            columns, figures = {name: kept[name] for name in kept.files}, json.loads(str(kept["figures"]))
        with np.load(self.record(first)) as kept:
            change = columns["kl"] - kept["kl"]
        figures |= {**summary(columns, change), "text": self.name, "length": self.length, "positions": self.positions, "side": side.name}
        figures["type"] = side.type
        return {**{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in figures.items()}, "run": path.stem}


def summary(columns: dict[str, np.ndarray], change: np.ndarray) -> dict[str, float]:
    """Figures of a side's positions. Rank correlations (Spearman) with KL are of sides that score each token, others know it every few."""
    import scipy.stats  # half a second and 50 MB, which whoever imports the bench for something else need not pay

    kl, missed = columns["kl"], columns["missed"]

    def rank(values: np.ndarray) -> float:
        return float(scipy.stats.spearmanr(values, kl).statistic)

    return {
        "kl_mean": float(kl.mean()), "kl_se": standard_error(kl), "kl_p99": float(np.percentile(kl, 99)),
        "kl_change": float(change.mean()), "kl_change_se": standard_error(change), "missed_mean": float(missed.mean()),
        "rank_missed_kl": rank(missed), "rank_worst_kl": rank(columns["worst"]), "rank_entropy_kl": rank(columns["entropy"]),
        "processor_seconds_per_token": float(columns["seconds"].mean()),
    }  # fmt: skip


def looks(arguments: argparse.Namespace) -> int:
    if not arguments.side:
        raise ValueError("--side: name the sides, the first is the one that all are compared with: none=asrkf,pool=12.5%;type=q8_0")
    if len(arguments.length) > 1:
        raise ValueError("--length: one, since sides are compared position by position")
    sides = [parse_side(text, arguments.pool) for text in arguments.side]
    shown = {
        "kl_mean": "mean KL", "kl_p99": "p99", "kl_change": "change", "kl_change_se": "± se", "second_looks": "looks",
        "rank_missed_kl": "rank", "processor_seconds_per_token": "s/token",
    }  # fmt: skip
    table, lines = Table(arguments.out or results_file("second_look.csv"), LOOKS, arguments.again), []
    for name, text in load_texts(arguments.text).items():
        one = Looks(arguments, name, text)
        for side in sides:
            row = {**describe(arguments), **one.row(side, sides[0])}
            table.add(row)
            lines.append([name, side.name, *(float(row[key]) for key in shown)])
    print(tabulate(lines, ["text", "side", *shown.values()], floatfmt=".4f"))
    print(f"rows in {table.path}")
    return 0
