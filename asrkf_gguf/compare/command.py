"""The command line of `asrkf compare`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ..models import MODEL_FORMS, resolve_model
from ..plotting import require_pyplot
from ..texts import load_texts
from .page import write_page
from .progress import Progress
from .reading import readings
from .report import Report, make_report
from .run import Run
from .sides import pooled_sides
from .tables import to_text, write_csv

OWN_TEXT = "Python's language reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Memory, speed, predictions and facts found, of upstream's caches (F16, Q8_0, Q4_0) and of pools, on this machine. The full F16 cache "
        "is what all are compared with. Control-C ends the run with a report of what there is."
    )
    parser.add_argument("model", help=MODEL_FORMS)
    parser.add_argument("-c", "--n-ctx", type=int, default=2048, help="context, tokens: best the one that you will use (default 2048)")
    sizes = "parts of the bytes of the full F16 cache (25%% or 0.25), bytes (512MiB), or auto: what fits the device"
    parser.add_argument("--pools", default="25%,50%", help=f"{sizes} (default 25%%,50%%)")
    parser.add_argument(
        "--policy", action="append", metavar="POLICY", dest="policies", default=[],
        help="of the pools, a kv_policy without its pool, such as asrkf,ranking=own or kvzip; repeatable, for each pool (default asrkf)",
    )  # fmt: skip
    parser.add_argument("--text", help=f"a file to read, best one like what you will use (default: {OWN_TEXT}, in pages that no calibration reads)")
    parser.add_argument("--rounds", type=int, default=3, help="each reads another passage of the text (default 3)")
    parser.add_argument("--positions", type=int, default=64, help="tokens to decode at each depth (default 64)")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
    files = {"json": "all figures", "csv": "a row for each cache and depth", "html": "a page with plots, which loads nothing from elsewhere"}
    for name, what in files.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)


def check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is loaded; ValueError or OSError says what would work."""
    for name, least in (("n_ctx", 1), ("rounds", 1), ("positions", 8)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    if arguments.text is not None and not Path(arguments.text).is_file():
        raise ValueError(f"--text {arguments.text}: there is no such file; without --text it is {OWN_TEXT}")
    for path in (arguments.json, arguments.csv, arguments.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    if arguments.html is not None:
        require_pyplot("--html draws its plots with")


def main(arguments: argparse.Namespace) -> int:
    check(arguments)
    pooled = pooled_sides(arguments.pools, arguments.policies or ["asrkf"])
    name = arguments.text or OWN_TEXT
    text = load_texts([f"text={arguments.text or 'topics'}"])["text"]
    arguments.model = resolve_model(arguments.model)
    run = Run(arguments, pooled, name, text)
    with only_errors("asrkf_gguf.llama_cpp"):  # of a pool our own log says the same
        pace = run.prepare()
        for side, reason in run.refused.items():
            print(f"{side} is left out: {reason}", file=sys.stderr)
        if not any(side.name in run.opened for side in pooled):
            raise ValueError(f"no pool to compare: {'; '.join(run.refused[side.name] for side in pooled)}")
        seconds = run.seconds(pace)
        print(f"{len(run.opened)} caches, rounds: {arguments.rounds}; about {duration(seconds)}. Fewer --rounds, a smaller -c or fewer --pools "
              "take less; Ctrl-C ends it with a report of what there is.", file=sys.stderr)  # fmt: skip
        with only_errors("asrkf_gguf"):  # what is said of a model and its pool was said when it was first opened
            run.go(Progress(pace, seconds))
    write(make_report(run), arguments)
    return 130 if run.stopped == "Ctrl-C" else 1 if run.stopped else 0


@contextlib.contextmanager
def only_errors(name: str) -> Iterator[None]:
    """In its with block a logger says nothing less."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def write(report: Report, arguments: argparse.Namespace) -> None:
    sentences = readings(report)
    print(to_text(report, sentences))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**report.to_dict(), "readings": sentences}, indent=1) + "\n")
    if arguments.csv is not None:
        write_csv(report, arguments.csv)
    if arguments.html is not None:
        write_page(report, sentences, arguments.html)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
