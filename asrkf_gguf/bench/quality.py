"""Perplexity, KL divergence and agreement of every side with the full cache, over real texts."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from ..llama import Llama
from ..models import cache_folder
from ..stats import MIB
from ..texts import load_texts
from .measure import cut_passages, fit, measure, summarise
from .records import DESCRIPTION, Table, describe, load_record, results_file, run_key, save_record
from .sides import REFERENCE, Side, chosen_sides, config_text, open_side, require_frozen

FIGURES = [
    "ppl", "ppl_ratio", "ppl_ratio_se", "kl_mean", "kl_se", "kl_p99", "top1_ratio",
    "device_kv_bytes", "device_index_bytes", "device_compute_bytes", "device_bytes", "host_kv_bytes",
    "moved_bytes_per_token", "restored_bytes_per_token", "rewalks", "decode_seconds_per_token",
]  # fmt: skip
QUALITY = [*DESCRIPTION, "text", "length", "positions", "passages", "chunk", "side", "config", "type", *FIGURES, "run"]


class Quality:
    """One run of `quality`: sides by lengths by texts; one context per side and length."""

    file = "quality.csv"
    more_figures: tuple[str, ...] = ()
    """Of kv_stats(), beside FIGURES."""

    def __init__(self, arguments: argparse.Namespace, texts: dict[str, str], sides: list[Side]) -> None:
        self.arguments, self.texts, self.sides = arguments, texts, sides
        self.folder = cache_folder() / "bench"
        self.folder.mkdir(exist_ok=True)
        self.table = Table(arguments.out or results_file(self.file), self.columns(), arguments.again)
        self.description = describe(arguments)
        self.rows: list[dict[str, Any]] = []

    @classmethod
    def columns(cls) -> list[str]:
        return [*QUALITY[:-1], *cls.more_figures, QUALITY[-1]]

    def figures_of(self, stats: dict[str, Any]) -> dict[str, Any]:
        """What the columns ask of kv_stats()."""
        return {key: stats[key] for key in (*FIGURES, *self.more_figures) if key in stats}

    def run_of(self, side: Side, length: int, text: str) -> str:
        arguments = self.arguments
        digest = hashlib.sha256(self.texts[text].encode()).hexdigest()
        more = {"figures": self.more_figures} if self.more_figures and side != REFERENCE else {}
        more = {**more, "positions": arguments.positions, "passages": arguments.passages, "chunk": arguments.chunk}
        return run_key(side, length, arguments, text=digest, **more)

    def paths(self, side: Side, length: int, text: str) -> tuple[Path, Path]:
        """Of the record, and (of the reference only) of the matrix of log probabilities."""
        run = self.run_of(side, length, text)
        return self.folder / f"{run}.npz", self.folder / f"{run}.npy"

    def is_done(self, side: Side, length: int, text: str) -> bool:
        record, matrix = self.paths(side, length, text)
        return not self.arguments.again and record.exists() and (side != REFERENCE or matrix.exists())

    def run(self) -> None:
        jobs = [(length, side) for length in self.arguments.length for side in self.sides]
        missing = {(length, side.name): [text for text in self.texts if not self.is_done(side, length, text)] for length, side in jobs}
        total = sum(min(length, side.n_ctx(length)) * len(missing[length, side.name]) for length, side in jobs) * self.arguments.passages
        with tqdm(total=total, unit="tok", desc="quality", disable=None) as bar:
            for length, side in jobs:
                if missing[length, side.name]:
                    with contextlib.closing(open_side(side, length, self.arguments)) as llm:
                        for text in missing[length, side.name]:
                            bar.set_description(f"{side.name} {length} {text}")
                            self.measure_text(llm, side, length, text, bar)
                for text in self.texts:
                    row = load_record(self.paths(side, length, text)[0])["row"]  # type: ignore[index]
                    row["side"] = side.name  # the measurement is the same under another name
                    self.rows.append(row)
                    if text not in missing[length, side.name]:
                        self.table.add(row)

    def measure_text(self, llm: Llama, side: Side, length: int, text: str, bar: tqdm) -> None:
        arguments = self.arguments
        record_path, matrix_path = self.paths(side, length, text)
        passages = [fit(llm, tokens, side.n_ctx(length) + 1) for tokens in cut_passages(llm, text, self.texts[text], length, arguments.passages)]
        reference, keep, part = None, None, matrix_path.with_suffix(".part.npy")
        if side == REFERENCE:
            shape = (arguments.passages * arguments.positions // arguments.chunk, llm.n_vocab())
            keep = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        else:
            reference = np.load(self.paths(REFERENCE, length, text)[1], mmap_mode="r")
        measured = measure(llm, passages, arguments.positions, arguments.chunk, reference, keep, bar)
        require_frozen(side, length, measured.stats)
        if keep is not None:
            keep.flush()
            part.rename(matrix_path)
        reference_record = load_record(self.paths(REFERENCE, length, text)[0]) if side != REFERENCE else None
        reference_nll = reference_record["nll"] if reference_record else measured.nll
        decoded = arguments.passages * arguments.positions
        figures = {
            **{key: value for key, value in self.figures_of(measured.stats).items() if key in FIGURES or side != REFERENCE},  # its record serves all
            **summarise(reference_nll, measured.nll, measured.kl, measured.agree),
            "moved_bytes_per_token": measured.moved_bytes / decoded, "restored_bytes_per_token": measured.restored_bytes / decoded,
            "rewalks": measured.rewalks, "decode_seconds_per_token": measured.seconds_per_token,
        }  # fmt: skip
        row = {
            **self.description, "text": text, "length": length, "positions": arguments.positions, "passages": arguments.passages,
            "chunk": arguments.chunk, "side": side.name, "config": config_text(llm), "type": side.type,
            **{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in figures.items()}, "run": record_path.stem,
        }  # fmt: skip
        save_record(record_path, measured, row)
        self.table.add(row)


class Cuts(Quality):
    """The same of policies that decide how much stays, with what they kept: `refreekv` of the prompt of the last passage, `kvzip` with a
    threshold of all its tokens."""

    file = "refreekv.csv"
    more_figures = ("kept_ratio", "enough_cells")

    def figures_of(self, stats: dict[str, Any]) -> dict[str, Any]:
        kept_ratio = stats["kept_ratio"]
        return {**super().figures_of(stats), "kept_ratio": kept_ratio if kept_ratio >= 0 else stats["active_cells"] / stats["tokens"]}


def pooled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per length and side: means over texts and the worst text; the newest row of each text counts."""
    newest = {(int(row["length"]), row["side"], row["text"]): row for row in rows}
    lines: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for (length, side, _), row in newest.items():
        lines.setdefault((length, side), []).append(row)
    result = []
    for (length, side), group in lines.items():
        worst = max(group, key=lambda row: float(row["kl_mean"]))
        result.append({
            "length": length, "side": side, "device_bytes": float(group[0]["device_bytes"]),
            "worst": worst["text"], "worst_kl": float(worst["kl_mean"]),
            "kl": float(np.mean([float(row["kl_mean"]) for row in group])), "top1": float(np.mean([float(row["top1_ratio"]) for row in group])),
            "ppl_ratio": math.exp(np.mean([math.log(float(row["ppl_ratio"])) for row in group])),
        })  # fmt: skip
    return sorted(result, key=lambda line: (line["length"], line["device_bytes"], line["kl"]))


def cuts(arguments: argparse.Namespace) -> int:
    return quality(arguments, Cuts)


def quality(arguments: argparse.Namespace, kind: type[Quality] = Quality) -> int:
    if arguments.positions % arguments.chunk:
        raise ValueError(f"--positions {arguments.positions} is no multiple of --chunk {arguments.chunk}")
    sides = chosen_sides(arguments)
    for length in arguments.length:
        for side in sides:
            if min(length, side.n_ctx(length)) <= arguments.positions:
                raise ValueError(
                    f"--positions {arguments.positions} leaves {side.name} nothing to read first of {min(length, side.n_ctx(length))} tokens: "
                    "lower --positions or raise --length or the pool"
                )
    run = kind(arguments, load_texts(arguments.text), sides)
    run.run()
    lines = [
        [line["length"], line["side"], line["device_bytes"] / MIB, line["kl"], line["ppl_ratio"], line["top1"], line["worst"], line["worst_kl"]]
        for line in pooled(run.rows)
    ]
    head = ["length", "side", "device MiB", "mean KL", "ppl ratio", "top-1", "worst text", "its KL"]
    print(tabulate(lines, head, floatfmt=("", "", ".1f", ".4f", ".4f", ".3f", "", ".4f")))
    print(f"rows in {run.table.path}")
    return 0
