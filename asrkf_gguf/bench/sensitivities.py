"""Does one pass (calibration.py) tell what a layer's history is worth, and does the loss grow as budgets are made from it?

For each layer and each number of cells the model is run with that layer alone restricted; the KL divergence of its last tokens from the
full cache's is compared with the one pass's sensitivity (rank correlation over the layers), and between numbers of cells with the loss
model of native/policy/budgets.cpp: proportional to 1 / active ratio - 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from ..calibrate import LEAST_CELLS, STEP_TOKENS, Runner, calibrate_quickly, mean_divergence, restricted
from ..calibration import read_tokens, standard_text
from ..texts import load_texts
from .records import DESCRIPTION, Table, describe, library_stamp, results_file
from .tables import made_by, markdown, newest

SENSITIVITIES = [*DESCRIPTION, "text", "length", "positions", "layer", "cells", "active_ratio", "one_pass", "kl_mean", "run"]


def predicted_growth(length: int, positions: int, cells: int) -> float:
    """1 / active ratio - 1, mean of the last positions; before a text has as many tokens as there are cells it is 0."""
    seen = np.arange(length - positions, length) + 1
    return float(np.mean(np.maximum(seen / cells - 1, 0)))


class Sensitivities:
    """Rows of one model; each is written as soon as it is measured, and none is measured twice."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.length, self.positions = arguments, arguments.length, arguments.positions
        for name in ("length", "positions"):
            if getattr(self, name) % STEP_TOKENS:
                raise ValueError(f"--{name} {getattr(self, name)}: a multiple of {STEP_TOKENS}")
        self.cells = arguments.cells or [self.length // 8, self.length // 4, self.length * 3 // 8, self.length // 2]
        for cells in self.cells:
            if cells % LEAST_CELLS or not 0 < cells < self.length:
                raise ValueError(f"--cells {cells}: a multiple of {LEAST_CELLS}, and fewer than --length {self.length}")
        self.table = Table(arguments.out or results_file("sensitivities.csv"), SENSITIVITIES, arguments.again)

    def run(self) -> list[dict[str, Any]]:
        threads, gpu_layers = self.arguments.threads, self.arguments.n_gpu_layers
        runner = Runner(self.arguments.model, self.length, threads, gpu_layers)
        one_pass = calibrate_quickly(self.arguments.model, standard_text(), threads=threads, n_gpu_layers=gpu_layers)["sensitivities"]
        said = dict(zip(runner.served_layers(), one_pass, strict=True))
        rows = []
        for name, text in load_texts(self.arguments.text).items():
            rows += self.of_text(runner, name, read_tokens(runner.llm.model, text, self.length), said)
        return rows

    def of_text(self, runner: Runner, name: str, tokens: list[int], one_pass: dict[int, float]) -> list[dict[str, Any]]:
        skip = self.length - self.positions
        reference, rows = None, []
        todo = [(layer, cells) for cells in self.cells for layer in one_pass]
        for layer, cells in tqdm(todo, desc=name, unit="run", file=sys.stderr):
            policy = restricted(layer, cells, list(one_pass), self.length)
            parts = [self.arguments.model.name, self.arguments.model.stat().st_size, library_stamp(), tokens, self.positions, policy]
            run = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
            row = self.table.find(run)
            if row is None:
                if reference is None:
                    reference = runner.log_probabilities("full", tokens, skip)
                figures = {
                    "active_ratio": 1 / (1 + predicted_growth(self.length, self.positions, cells)), "one_pass": one_pass[layer],
                    "kl_mean": mean_divergence(reference, runner.log_probabilities(policy, tokens, skip)),
                }  # fmt: skip
                row = {
                    **describe(self.arguments), "text": name, "length": self.length, "positions": self.positions, "layer": layer, "cells": cells,
                    **{key: f"{value:.6g}" for key, value in figures.items()}, "run": run,
                }  # fmt: skip
                self.table.add(row)
            rows.append(row)
        return rows


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, text and number of cells: rank correlation with the one pass, and the loss beside the loss model's.

    predicted_ratio: what the loss model expects of all layers together, from their loss at the cells nearest to a fifth, in times of
    what was measured. rank_to_fifth: rank correlation of the layers' losses with those at these cells.
    """
    import scipy.stats  # half a second and 50 MB, which whoever imports the bench for something else need not pay

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in ("model", "text", "length", "positions")), []).append(row)

    def rank(one: list[float], other: list[float]) -> float:
        return float(scipy.stats.spearmanr(one, other).statistic)

    lines = []
    for (model, text, _, _), group in groups.items():
        by_cells: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(group, key=lambda row: (int(row["cells"]), int(row["layer"]))):
            by_cells.setdefault(int(row["cells"]), []).append(row)
        losses = {cells: [float(row["kl_mean"]) for row in of_cells] for cells, of_cells in by_cells.items()}
        growth = {cells: 1 / float(of_cells[0]["active_ratio"]) - 1 for cells, of_cells in by_cells.items()}
        fifth = min(growth, key=lambda cells: abs(float(by_cells[cells][0]["active_ratio"]) - 0.2))
        for cells, of_cells in by_cells.items():
            lines.append({
                "model": model, "text": text, "cells": cells, "active_ratio": float(of_cells[0]["active_ratio"]), "n_layers": len(of_cells),
                "rank_one_pass": rank([float(row["one_pass"]) for row in of_cells], losses[cells]),
                "rank_to_fifth": rank(losses[fifth], losses[cells]),
                "kl_sum": sum(losses[cells]), "predicted_ratio": sum(losses[fifth]) * growth[cells] / growth[fifth] / sum(losses[cells]),
            })  # fmt: skip
    return lines


def sensitivities(arguments: argparse.Namespace) -> int:
    one = Sensitivities(arguments)
    lines = summaries(one.run())
    head = {
        "text": "text", "cells": "cells", "active_ratio": "active", "rank_one_pass": "rank, one pass", "rank_to_fifth": "rank, fifth",
        "kl_sum": "KL, all layers", "predicted_ratio": "predicted / measured",
    }  # fmt: skip
    print(tabulate([[line[key] for key in head] for line in lines], list(head.values()), floatfmt=("", "", ".3f", ".2f", ".2f", ".4f", ".2f")))
    print(f"rows in {one.table.path}")
    return 0


def table_of_sensitivities(_arguments: argparse.Namespace) -> int:
    rows = newest(results_file("sensitivities.csv"), "model", "text", "length", "positions", "layer", "cells")
    head = (
        "model", "text", "cells of one layer", "layers", "active ratio", "rank correlation with one pass", "and with the cells nearest to a fifth",
        "KL, all layers", "the loss model's, in times of it",
    )  # fmt: skip
    cells = [
        (
            line["model"], line["text"], str(line["cells"]), str(line["n_layers"]), f"{line['active_ratio']:.2f}", f"{line['rank_one_pass']:.2f}",
            f"{line['rank_to_fifth']:.2f}", f"{line['kl_sum']:.3f}", f"{line['predicted_ratio']:.2f}",
        )
        for line in summaries(rows)
    ]  # fmt: skip
    print("\n".join([*markdown(head, cells), *made_by(rows)]))
    return 0
