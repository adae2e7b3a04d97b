"""`asrkf plot`: the picture of a run that `asrkf run --trace` recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..plotting import require_pyplot
from ..traces import Trace, read_trace

COLOURS = {"active": "#4c9f70", "frozen": "#5b8fd6", "pinned": "#d9822b"}  # the page at /kv has the same

REWALK = 1  # occasion of struct asrkf_step; from RECOVERY on, recoveries
RECOVERY = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw active and frozen tokens, missed attention, entropy, and where the tokens were at the end."
    parser.add_argument("trace", type=Path, metavar="FILE", help="a CSV file of asrkf run MODEL --trace FILE")
    parser.add_argument("-o", "--out", type=Path, help="the picture: .png, .svg or .pdf (default: FILE with .png)")


def main(arguments: argparse.Namespace) -> int:
    trace = read_trace(arguments.trace)
    pyplot = require_pyplot()
    out = arguments.out or arguments.trace.with_suffix(".png")
    draw(pyplot, trace, arguments.trace.name).savefig(out, dpi=120)
    print(out)
    return 0


def draw(pyplot: Any, trace: Trace, title: str) -> Any:
    """Over positions: tokens by state, missed attention, entropy; below them the map of each layer group."""
    n_groups = len({run["group"] for run in trace.runs})
    heights = [3.0, 1.6, 1.6] + ([0.5 + 0.35 * n_groups] if n_groups else [])
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 1), sharex=True, layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    figure.suptitle(title)
    draw_cells(axes[0], trace.steps)
    draw_missed(axes[1], trace.steps)
    draw_entropy(axes[2], trace.steps)
    if n_groups:
        draw_map(axes[3], trace.runs)
    axes[-1].set_xlabel("position")
    return figure


def draw_cells(axes: Any, steps: list[dict[str, float]]) -> None:
    ends = [step["pos"] + step["n_tokens"] for step in steps]
    for state in ("active", "frozen"):
        axes.plot(ends, [step[f"{state}_cells"] for step in steps], label=state, color=COLOURS[state], linewidth=1.2)
    axes.set_ylabel("tokens, mean\nover the layers")
    axes.legend(loc="upper left")


def draw_missed(axes: Any, steps: list[dict[str, float]]) -> None:
    forward = [step for step in steps if step["occasion"] != REWALK]  # which goes back
    scored = [step for step in forward if step["missed_attention_ratio"] >= 0]  # before the first scores there is none
    for key, label in (("missed_attention_worst_ratio", "worst head"), ("missed_attention_ratio", "mean of the heads")):
        axes.plot([step["pos"] for step in scored], [step[key] for step in scored], label=label, linewidth=1.0)
    axes.set_ylabel("missed\nattention")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def draw_entropy(axes: Any, steps: list[dict[str, float]]) -> None:
    single = [step for step in steps if step["n_tokens"] == 1]  # a prompt's outputs are not looked at
    axes.plot([step["pos"] for step in single], [step["entropy"] for step in single], color="#555555", linewidth=0.8)
    recoveries = [step["pos"] for step in steps if step["occasion"] >= RECOVERY]
    if recoveries:
        axes.plot(recoveries, [0] * len(recoveries), "v", color="#c0392b", label="recovery")
        axes.legend(loc="upper left")
    axes.set_ylabel("entropy, nats")


def draw_map(axes: Any, runs: list[dict[str, Any]]) -> None:
    layers = {run["group"]: run["n_layers"] for run in runs}
    for state, colour in COLOURS.items():
        for group in layers:
            spans = [(run["begin"], run["end"] - run["begin"]) for run in runs if (run["group"], run["state"]) == (group, state)]
            axes.broken_barh(spans, (group - 0.4, 0.8), color=colour, linewidth=0, label=state if group == 0 else None)
    axes.set_yticks(list(layers), [f"{n} layer{'s' * (n > 1)}" for n in layers.values()])
    axes.invert_yaxis()
    axes.set_ylabel("at the end")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)  # above the strips
