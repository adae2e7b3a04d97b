"""Pictures: loss over bytes of the rows in results/, and one run as it goes."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..plotting import colours, require_pyplot
from ..stats import MIB
from ..texts import load_texts
from .measure import cut_passages, feed, last_logits
from .records import results_file
from .sides import config_text, open_side, parse_side
from .tables import Loss, losses


def plot(arguments: argparse.Namespace) -> int:
    pyplot = require_pyplot()
    rows = arguments.rows or results_file("quality.csv")
    figure = plot_run(pyplot, arguments) if arguments.run else plot_quality(pyplot, rows)
    path = arguments.out or results_file("run.png" if arguments.run else "quality.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    # a picture of rows names them, so that a test can tell one that is out of date
    names = {"Source": f"sha256 {hashlib.sha256(rows.read_bytes()).hexdigest()}"} if path.suffix == ".png" and not arguments.run else None
    figure.savefig(path, dpi=150, metadata=names)
    print(path)
    return 0


KINDS = {"upstream's cache": "s", "ours": "o", "control": "^"}  # and their markers


def kind_of(loss: Loss) -> str:
    if loss.policy == "full":
        return "upstream's cache"
    return "ours" if loss.policy == "asrkf" else "control"


def plot_quality(pyplot: Any, source: Path) -> Any:
    """Mean KL over device bytes, one panel a length; bars are standard errors. The newest row of each side, length and text."""
    if not source.exists():
        raise ValueError(f"{source} does not exist: run the quality bench first, or name a file with --rows")
    found = [loss for loss in losses(source) if loss.mean("kl_mean") > 0]  # the reference has none
    if not found:
        raise ValueError(f"{source} has no row besides the reference's: run the quality bench with more sides")
    by_length = {length: [loss for loss in found if loss.length == length] for length in sorted({loss.length for loss in found})}
    kinds = {loss.side: kind_of(loss) for loss in found}
    # in the legend by kind, the plain ones first; found has the best first
    sides = [side for kind in KINDS for side in sorted(kinds, key=lambda side: side.count("=")) if kinds[side] == kind]
    colour = dict(zip(sides, colours(len(sides)), strict=True))
    widths = [1 + min(1, len(panel) / 8) for panel in by_length.values()]
    figure, axes = pyplot.subplots(
        1, len(by_length), figsize=(1.7 * sum(widths) + 3, max(4.5, 1 + 0.22 * len(sides))), width_ratios=widths, squeeze=False, sharey=True,
        layout="constrained",
    )
    drawn: dict[str, Any] = {}
    for axis, (length, panel) in zip(axes[0], by_length.items(), strict=True):
        for loss in panel:
            drawn[loss.side] = axis.errorbar(
                loss.device_bytes / MIB, loss.mean("kl_mean"), loss.kl_error, fmt=KINDS[kinds[loss.side]], color=colour[loss.side],
                markersize=5, capsize=3, label=loss.side,
            )  # fmt: skip
        most = max(loss.device_bytes for loss in panel) / MIB
        axis.set(yscale="log", title=f"{length} tokens", xlim=(0, 1.08 * most))
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="mean KL to the full F16 cache, nats")
    figure.supxlabel("KV and index on the device, MiB", fontsize="medium")
    title = "squares: upstream's cache\ncircles: ours\ntriangles: controls, and other methods"
    figure.legend([drawn[side] for side in sides], sides, loc="outside right upper", title=title, alignment="left")
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
    figure, axes = pyplot.subplots(1 + has_entropy, 1, figsize=(9, 4 + 2 * has_entropy), squeeze=False, layout="constrained")
    cells = [[step[key] for step in trace.steps] for key in ("active_cells", "frozen_cells")]
    axes[0][0].stackplot(ends, *cells, labels=["active", "frozen"], alpha=0.8)
    axes[0][0].axvline(len(tokens), color="black", linestyle=":", label="generation begins")
    axes[0][0].set(ylabel="tokens, mean over the layers", title=f"{arguments.model.name}, {name}: {config.split(',layers')[0]}")
    axes[0][0].legend(loc="upper left")
    if has_entropy:  # of what was generated: a prompt's outputs are not looked at
        outputs = [(step["pos"], step["entropy"]) for step in trace.steps if step["pos"] >= len(tokens)]
        axes[1][0].plot(*zip(*outputs, strict=True), linewidth=0.8)
        axes[1][0].set(ylabel="entropy of the output, nats", xlabel="position, from where generation begins")
    axes[0][0].set(xlabel="position")
    return figure
