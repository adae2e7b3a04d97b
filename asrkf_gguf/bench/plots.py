"""Pictures: loss over bytes of the rows in results/, and one run as it goes."""

from __future__ import annotations

import argparse
import contextlib
import csv
from typing import Any

from tqdm import tqdm

from ..stats import MIB
from ..texts import load_texts
from .measure import cut_passages, feed, last_logits
from .quality import pooled
from .records import results_file
from .sides import config_text, open_side, parse_side


def plot(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'asrkf-gguf[bench]' or pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = plot_run(pyplot, arguments) if arguments.run else plot_quality(pyplot, arguments)
    path = arguments.out or results_file("run.png" if arguments.run else "quality.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)
    return 0


def plot_quality(pyplot: Any, arguments: argparse.Namespace) -> Any:
    """Mean KL over device bytes, one panel a length, from the newest row of each side, length and text."""
    source = arguments.rows or results_file("quality.csv")
    if not source.exists():
        raise ValueError(f"{source} does not exist: run the quality bench first, or name a file with --rows")
    with source.open(newline="") as file:
        lines = [line for line in pooled(csv.DictReader(file)) if line["kl"] > 0]  # the reference has none
    lengths = sorted({line["length"] for line in lines})
    if not lengths:
        raise ValueError(f"{source} has no row besides the reference's: run the quality bench with more sides")
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(4 * len(lengths) + 2, 5), squeeze=False, sharey=True, layout="constrained")
    sides = list(dict.fromkeys(line["side"] for line in sorted(lines, key=lambda line: line["kl"])))
    markers = {side: ("osD^v"[i // 10 % 5], f"C{i % 10}") for i, side in enumerate(sides)}
    drawn: dict[str, Any] = {}
    for axis, length in zip(axes[0], lengths, strict=True):
        for line in lines:
            if line["length"] == length:
                marker, colour = markers[line["side"]]
                drawn[line["side"]] = axis.plot(line["device_bytes"] / MIB, line["kl"], marker, color=colour)[0]
        axis.set(yscale="log", xlabel="KV and index on the device, MiB", title=f"{length} tokens", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="mean KL to the full F16 cache, nats")
    figure.legend([drawn[side] for side in sides], sides, loc="outside right upper")
    return figure


def plot_run(pyplot: Any, arguments: argparse.Namespace) -> Any:
    """Active and frozen cells, and entropy if the engine records it, while one text is read and continued."""
    side = parse_side(arguments.side, arguments.pool)
    if not side.is_pooled:
        raise ValueError(f"--side {arguments.side}: only a policy freezes, and upstream's cache has no trace: try --side asrkf")
    name, text = next(iter(load_texts(arguments.text).items()))
    with contextlib.closing(open_side(side, arguments.length, arguments)) as llm:
        tokens = cut_passages(llm, name, text, arguments.length, 1)[0][: arguments.length - arguments.positions]
        with llm.kv_trace() as trace, tqdm(total=arguments.length, unit="tok", desc="run", disable=None) as bar:
            feed(llm, tokens, bar)
            for _ in range(arguments.positions):
                feed(llm, [int(last_logits(llm).argmax())], bar)
        config = config_text(llm)
    ends = [step["pos"] + step["n_tokens"] for step in trace.steps]
    has_entropy = bool(trace.steps) and "entropy" in trace.steps[0]
    figure, axes = pyplot.subplots(1 + has_entropy, 1, figsize=(9, 4 + 2 * has_entropy), sharex=True, squeeze=False, layout="constrained")
    cells = [[step[key] for step in trace.steps] for key in ("active_cells", "frozen_cells")]
    axes[0][0].stackplot(ends, *cells, labels=["active", "frozen"], alpha=0.8)
    axes[0][0].axvline(len(tokens), color="black", linestyle=":", label="generation begins")
    axes[0][0].set(ylabel="tokens", title="\n".join(config[i : i + 110] for i in range(0, len(config), 110)))
    axes[0][0].title.set_fontsize(7)
    axes[0][0].legend(loc="upper left")
    if has_entropy:
        axes[1][0].plot(ends, [step["entropy"] for step in trace.steps], linewidth=0.8)
        axes[1][0].set(ylabel="entropy, nats")
    axes[-1][0].set(xlabel="position")
    return figure
