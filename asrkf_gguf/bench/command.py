"""The bench's command line: quality, cuts, needles, judge and plot for everyone; speed, prefill and README's tables in a checkout."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..models import MODEL_FORMS, resolve_model
from ..tasks import TASKS
from .judge import JUDGED_TASKS, judge
from .judge_tables import table_of_equal_bytes, table_of_judge
from .looks import looks
from .needles import OWN_TASKS, needles
from .pairs import pairs, table_of_pairs
from .plots import plot
from .quality import cuts, quality
from .sensitivities import sensitivities, table_of_sensitivities
from .sides import default_sides
from .speed import prefill, speed
from .tables import table, table_of_calibration, table_of_cuts, table_of_looks, tables_of_quality, tables_of_readme


def add_arguments(parser: argparse.ArgumentParser, in_checkout: bool = False) -> None:
    """quality, cuts, needles, judge and plot; in a checkout also what needs the unpatched build or makes README's tables."""
    commands = parser.add_subparsers(dest="what", required=True)

    def add(name: str, text: str, function: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(bench_function=function)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")
        return command

    _add_quality(add("quality", "perplexity and KL against the full cache", quality))
    _add_quality(add("cuts", "the same, with what was kept by refreekv, or by kvzip with a threshold: name sides such as "
                             "1%%=refreekv,pool=1.0,tolerance=0.01", cuts))
    _add_needles(add("needles", "facts found in long prompts", needles))
    _add_judge(add("judge", "all policies and upstream's caches at equal device bytes, in texts and tasks: one table", judge))
    _add_plot(add("plot", "a picture of rows, or of a run", plot))
    if in_checkout:
        _add_speed(add("speed", "decoding at a depth: ours, upstream's full cache, and upstream with n_ctx = pool", speed), depth=7680, rounds=9)
        _add_speed(add("prefill", "reading a prompt, and peak resident bytes: ours and upstream's full cache", prefill), depth=8000, rounds=3)
        _add_sides(add("looks", "what a token missed, and what a second look gains; the first side is what all are compared with", looks))
        _add_sensitivities(add("sensitivities", "what each layer's history is worth, measured, beside what one pass says", sensitivities))
        _add_pairs(add("pairs", "masks of pairs beside masks of tokens: what heads lose that share cells", pairs))
        add("pairs-table", "the same as the table of docs/results.md", table_of_pairs)
        add("table", "the newest row of each figure of speed and prefill as the table of docs/results.md", table)
        add("quality-table", "the same of quality and needles", tables_of_quality)
        add("equal-bytes-table", "of the judge: upstream's caches and pools of a part of the full F16 cache's bytes", table_of_equal_bytes)
        add("judge-table", "the tables of the judge's rows", table_of_judge)
        add("calibration-table", "of calibration.csv: the same pools with a calibration and without", table_of_calibration)
        add("sensitivities-table", "of sensitivities.csv: rank correlation with one pass, and the loss model", table_of_sensitivities)
        add("looks-table", "the same of looks", table_of_looks)
        add("cuts-table", "the same of cuts", table_of_cuts)
        add("readme-tables", "README's small tables: what a pool gains, and what it costs", tables_of_readme)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="smollm2", help=f"{MODEL_FORMS} (default smollm2)")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", type=Path, help="file to write (default: in results/)")


def _add_texts(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--text", action="append", default=[], metavar="NAME=FILE",
                         help="repeatable; default: sawyer (a novel), essay and technical, out of Debian packages, each of which can be named "
                              "alone; NAME=topics: Python's reference; NAME=arithmetic: worked problems")
    command.add_argument("--pool", default="0.33", help="of the default sides: part of the length, or cells (default 0.33)")
    command.add_argument("--positions", type=int, default=512, help="last tokens of a text, decoded as if generated (default 512)")
    command.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")


def _add_sides(command: argparse.ArgumentParser) -> None:
    _add_texts(command)
    command.add_argument("--length", type=int, action="append", help="tokens, repeatable (default 4096)")
    command.add_argument("--side", action="append", default=[], metavar="NAME=POLICY[;type=q8_0][;ctx=pool]",
                         help=f"repeatable; POLICY with pool (asrkf,pool=0.33), or one of {', '.join(default_sides('0.33'))} (default: all)")
    command.add_argument("--again", action="store_true", help="measure anew what was measured")


def _add_quality(command: argparse.ArgumentParser) -> None:
    _add_sides(command)
    command.add_argument("--chunk", type=int, default=1, help="tokens a decoding step (default 1)")
    command.add_argument("--passages", type=int, default=1, help="passages of each text (default 1)")


def _add_needles(command: argparse.ArgumentParser) -> None:
    _add_sides(command)
    command.add_argument("--needles", type=int, default=10, help="questions a task (default 10)")
    command.add_argument("--task", action="append", choices=list(TASKS), help=f"repeatable (default: {', '.join(OWN_TASKS)})")


def _add_judge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", action="append", dest="models", metavar="MODEL", help=f"repeatable; {MODEL_FORMS} (default smollm2)")
    command.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
    command.add_argument("--threads", type=int, default=2, help="of each process")
    command.add_argument("--length", type=int, action="append",
                         help="tokens, repeatable; tasks, and all sides, at the first only (default 4096, 8192, 2048)")
    command.add_argument("--positions", type=int, default=512, help="last tokens of a text, decoded as if generated (default 512)")
    command.add_argument("--needles", type=int, default=30, help="questions a task (default 30)")
    command.add_argument("--task", action="append", choices=JUDGED_TASKS, help="repeatable (default: all)")
    command.add_argument("--only", choices=("texts", "tasks"), default="", help="leave the other half out")
    command.add_argument("--side", action="append", default=[], dest="judged_sides", metavar="NAME", help="of the table, repeatable (default: all)")
    command.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="as in quality")
    command.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where its rows go (default results/)")
    command.add_argument("--again", action="store_true", help="measure anew what was measured")


def _add_plot(command: argparse.ArgumentParser) -> None:
    _add_texts(command)
    command.add_argument("--rows", type=Path, help="rows to draw (default results/quality.csv)")
    command.add_argument("--run", action="store_true", help="draw active and frozen cells over one generation instead")
    command.add_argument("--side", default="asrkf", help="of --run: NAME=POLICY[;type=...], or a default side")
    command.add_argument("--length", type=int, default=4096, help="of --run, tokens (default 4096)")


def _add_sensitivities(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="as in quality")
    command.add_argument("--length", type=int, default=2048, help="tokens of a text (default 2048)")
    command.add_argument("--positions", type=int, default=512, help="last tokens of a text, which are compared (default 512)")
    command.add_argument("--cells", type=int, action="append", help="of the restricted layer, repeatable (default: 1/8, 1/4, 3/8 and 1/2 of length)")
    command.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    command.add_argument("--again", action="store_true", help="measure anew what was measured")


def _add_pairs(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="as in quality")
    command.add_argument("--length", type=int, default=2048, help="tokens of a text (default 2048)")
    command.add_argument("--positions", type=int, default=512, help="last tokens of a text, which see a part of the others' pairs (default 512)")
    command.add_argument("--again", action="store_true", help="measure anew what was measured")


def _add_speed(command: argparse.ArgumentParser, depth: int, rounds: int) -> None:
    _add_model(command)
    command.add_argument("--text", type=Path, help="a text file; default: the standard library's pydoc_data.topics")
    command.add_argument("--depth", type=int, default=depth, help=f"tokens before measuring (default {depth})")
    command.add_argument("--pool", type=int, default=2048, help="cells")
    command.add_argument("--policy", default="asrkf")
    command.add_argument("--rounds", type=int, default=rounds, help=f"(default {rounds})")
    command.add_argument("--tokens", type=int, default=24, help="tokens a round, a multiple of the interval")


def main(arguments: argparse.Namespace) -> int:
    if hasattr(arguments, "model") and (arguments.what != "plot" or arguments.run):
        arguments.model = resolve_model(arguments.model)
    for name in ("positions", "threads", "chunk", "passages", "needles", "depth", "rounds", "tokens", "jobs"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: at least 1")
    if arguments.what in ("quality", "cuts", "needles", "looks"):
        arguments.length = arguments.length or [4096]
    if arguments.what == "judge":
        arguments.length = arguments.length or [4096, 8192, 2048]
    return arguments.bench_function(arguments)
