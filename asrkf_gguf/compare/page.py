"""A report as one HTML file: tables and plots, in light and dark, with nothing to load from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from ..plotting import colours, require_pyplot
from ..stats import MIB
from .report import Figures, Report, SideReport, Spread
from .sides import REFERENCE
from .tables import KINDS, tables

INK = "#010203"  # in a plot's SVG; the page gives it its own colour of text


def write_page(report: Report, readings: list[str], path: Path) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.render(report=report, readings=readings, tables=tables(report), plots=plots(report))
    path.write_text(page, encoding="utf-8")


def plots(report: Report) -> list[tuple[str, str]]:
    """Title and SVG of each; none of a report without figures."""
    sides = [side for side in report.sides if side.depths]
    if not sides:
        return []
    pyplot = require_pyplot()
    styles = _styles(pyplot, report)
    drawn: dict[str, Callable[[Any], None]] = {
        "Loss over the bytes on the device": lambda axes: _loss_over_bytes(axes, report, styles),
        "Decoding, over the depth": lambda axes: _speed(axes, sides, styles, lambda figures: figures.decode_tokens_per_second),
        "Reading a prompt, over the depth": lambda axes: _speed(axes, sides, styles, lambda figures: figures.read_tokens_per_second),
        "Loss over the depth": lambda axes: _loss_over_depth(axes, [side for side in sides if side.name != report.reference], styles),
        "Memory by kind": lambda axes: _memory(axes, report),
    }
    return [(title, _svg(pyplot, title, draw)) for title, draw in drawn.items()]


def _styles(pyplot: Any, report: Report) -> dict[str, dict[str, Any]]:
    """By side: upstream's caches are squares and dashed, pools circles."""
    shapes = {True: {"marker": "s", "linestyle": "--"}, False: {"marker": "o", "linestyle": "-"}}
    return {
        side.name: {"label": side.name, "color": colour, **shapes[side.name.startswith("upstream")]}
        for side, colour in zip(report.sides, colours(len(report.sides)), strict=True)
    }


def _speed(axes: Any, sides: list[SideReport], styles: dict[str, dict[str, Any]], figure_of: Callable[[Figures], Spread]) -> None:
    for side in sides:
        spreads = [figure_of(figures) for figures in side.depths]
        errors = [[spread.median - spread.least for spread in spreads], [spread.most - spread.median for spread in spreads]]
        axes.errorbar([figures.depth for figures in side.depths], [spread.median for spread in spreads], errors, capsize=3, **styles[side.name])
    axes.set(xlabel="depth, tokens", ylabel="tokens a second")
    _from_zero(axes)


def _loss_over_depth(axes: Any, sides: list[SideReport], styles: dict[str, dict[str, Any]]) -> None:
    for side in sides:
        axes.plot([figures.depth for figures in side.depths], [figures.kl_mean for figures in side.depths], **styles[side.name])
    axes.set(xlabel="depth, tokens", ylabel="KL, mean, nats")
    _from_zero(axes)


def _loss_over_bytes(axes: Any, report: Report, styles: dict[str, dict[str, Any]]) -> None:
    for side, figures in report.at_end().values():
        if side.memory is not None and side.name != report.reference:
            style = {**styles[side.name], "linestyle": "none"}
            axes.errorbar(side.memory.cache_bytes / MIB, figures.kl_mean, figures.kl_se, capsize=3, **style)
    full = next((side.memory for side in report.sides if side.name == REFERENCE.name), None)
    if full is not None:
        axes.axvline(full.cache_bytes / MIB, color=INK, linewidth=0.8, linestyle=":", label=f"{REFERENCE.name} (KL 0)")
    axes.set(xlabel="K, V and index on the device, MiB", ylabel="KL, mean, nats")
    _from_zero(axes)


def _from_zero(axes: Any) -> None:
    """Both axes, with room behind the last point."""
    axes.margins(0.08)
    axes.autoscale_view()
    axes.set(xlim=(0, axes.get_xlim()[1]), ylim=(0, axes.get_ylim()[1]))


def _memory(axes: Any, report: Report) -> None:
    sides = [side for side in report.sides if side.memory is not None][::-1]
    left = [0.0] * len(sides)
    for label, name in KINDS.items():
        sizes = [getattr(side.memory, name) / MIB for side in sides]
        if not any(sizes):
            continue
        axes.barh([side.name for side in sides], sizes, left=left, label=label, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set(xlabel="MiB")


def _svg(pyplot: Any, title: str, draw: Callable[[Any], None]) -> str:
    """The plot as an element of a page, in the page's font and colours."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    with pyplot.rc_context({**dict.fromkeys(names, INK), "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(figsize=(4.8, 3.4), layout="constrained")
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
        draw(axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = out.getvalue().replace(INK, "currentColor")
    return svg[svg.index("<svg") :]  # without the head of a file of its own
