"""`asrkf gates`: train a model's gates, convert published ones, or show what a file of them is."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Optional

from tabulate import tabulate

from ..calibration import standard_text
from ..models import MODEL_FORMS, resolve_model
from .convert import convert
from .file import Gates, default_file, read_gates, write_gates
from .train import TOKENS, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A gate is a small network in an attention layer that tells from a token's hidden state alone how much attention the token will get "
        "(Fast KVzip, arXiv 2601.17668). kv_policy=kvzip keeps what the gates value, so it needs those of its model. Both ways to make "
        "them need PyTorch: pip install torch."
    )
    ways = parser.add_subparsers(dest="way", required=True)
    learn = ways.add_parser("train", help="train them on the model's own attention with texts: minutes to hours")
    learn.add_argument("model", help=MODEL_FORMS)
    learn.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the texts, of each the same share (default %(default)s)")
    learn.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="read this, too, besides Python's pydoc_data.topics; may be repeated"
    )
    learn.add_argument("-t", "--threads", type=int, default=None)
    learn.add_argument("--n-gpu-layers", type=int, default=-1, help="layers of the model on the GPU (default: all); the gates are trained on the CPU")
    learn.add_argument(
        "--work-folder", type=Path, help="where features lie until the end (default: the folder of gates); a run that was stopped goes on from there"
    )
    learn.add_argument("--seed", type=int, default=0)
    change = ways.add_parser(
        "convert", help="convert published gates, a PyTorch file (.pt)",
        description="None come with this package, and none are fetched. The licence of the published ones is not known: ask before you pass them on.",
    )  # fmt: skip
    change.add_argument("file", type=Path, help="published gates: q{G}_dim16_sink16.pt")
    change.add_argument("model", help=f"the model that they are of: {MODEL_FORMS}")
    show = ways.add_parser("info", help="what a file of gates holds")
    show.add_argument("file", type=Path)
    for way in (learn, change):
        way.add_argument("--out", type=Path, help="the file to write (default: in the cache folder, where the engine finds it)")
    for way in (learn, change, show):
        way.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")


def main(arguments: argparse.Namespace) -> int:
    return {"train": main_train, "convert": main_convert, "info": main_info}[arguments.way](arguments)


def main_info(arguments: argparse.Namespace) -> int:
    gates = read_gates(arguments.file)
    print(summary(gates))
    return 0


def main_convert(arguments: argparse.Namespace) -> int:
    path = resolve_model(arguments.model)
    keep(convert(arguments.file, path), path, arguments.out)
    return 0


def main_train(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    path = resolve_model(arguments.model)
    texts = [standard_text(), *(Path(file).read_text(encoding="utf-8", errors="replace") for file in arguments.text)]
    try:
        gates, figures, features = train(
            path, texts, arguments.tokens, arguments.work_folder, arguments.threads, arguments.n_gpu_layers,
            arguments.seed, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("asrkf gates: stopped; what is finished is kept: the same command goes on from there", file=sys.stderr)
        raise
    rows = [
        {
            "layer": il, "loss": f.loss, "of the mean": f.mean_loss, "agreement": f.agreement, "of the commoner": f.mean_agreement,
            "rank correlation": f.rank_correlation,
        }
        for il, f in figures.items()
    ]  # fmt: skip
    print("on the tokens that were held out:")
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    keep(gates, path, arguments.out)
    features.delete()
    print(f"in {time.perf_counter() - began:.0f} s")
    return 0


def keep(gates: Gates, model_path: Path, out: Optional[Path]) -> None:
    path = out or default_file(model_path)
    write_gates(path, gates)
    found = "" if out else "; kv_policy=kvzip finds it there"
    print(f"{path} written, {path.stat().st_size / 1e6:.1f} MB: {summary(gates)}{found}")


def summary(gates: Gates) -> str:
    layers = list(gates.layers)
    first = gates.layers[layers[0]]
    known = [
        f"gates of {len(layers)} layers ({layers[0]} to {layers[-1]}) of the model {gates.model}",
        f"{first.n_heads_kv} KV heads with {first.group} query heads each",
        gates.source,
        f"{gates.tokens} tokens" if gates.tokens else "",
        f"agreement {gates.agreement:.3f}" if math.isfinite(gates.agreement) else "",
    ]
    return ", ".join(filter(None, known))
