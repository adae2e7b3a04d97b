"""`asrkf calibrations`: which models have one, and where."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from .. import _native
from ..calibrate import cached_file
from ..models import MODEL_FORMS, cache_folder, find_side_file, resolve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Without MODEL: the calibrations in the cache folder and in the package. (Those beside a model are found with it.)"
    parser.add_argument("model", nargs="?", help=f"say which one this model has: {MODEL_FORMS}")
    parser.add_argument("--json", action="store_true", help="all that the files say")


def main(arguments: argparse.Namespace) -> int:
    if arguments.model:
        path = resolve_model(arguments.model)
        found = calibration_of(path)
        files = [found] if found else []
        nothing = f"{path.name} has no calibration: asrkf calibrate {arguments.model}"
    else:
        files = [*sorted(folder().glob("*.asrkf.json")), *sorted((_native.PACKAGE / "calibrations").glob("*.asrkf.json"))]
        nothing = f"no calibrations in {folder()}: asrkf calibrate MODEL makes one"
    known = [{"file": str(file), **read(file)} for file in files]
    if arguments.json:
        print(json.dumps(known, indent=1))
    elif known:
        print(tabulate([row(content) for content in known], headers="keys"))
    else:
        print(nothing)
    return 0


def folder() -> Path:
    """Where calibrations are kept: the parent of what the engine says of a model (asrkf_calibration_file)."""
    return Path(os.environ.get("ASRKF_CALIBRATIONS") or cache_folder() / "calibrations")


def calibration_of(path: Path) -> Optional[Path]:
    """The one that contexts of this model get, in the order in which Llama looks for them."""
    cached = cached_file(path, 0)
    return find_side_file(path) or (cached if cached.exists() else None)


def read(file: Path) -> dict[str, Any]:
    """Its content; for a damaged one what is wrong with it."""
    try:
        content = json.loads(file.read_text())
        return content if isinstance(content, dict) else {"damaged": "it holds no object"}
    except (OSError, ValueError) as error:
        return {"damaged": str(error)}


def row(content: dict[str, Any]) -> dict[str, Any]:
    if "damaged" in content:
        return {"model": f"damaged: {content['damaged']}", "file": content["file"]}
    return {
        "model": content.get("model_file") or content.get("model_name") or content.get("model"),
        "layers": len(content.get("sensitivities", [])),
        "scoring layers": ", ".join(map(str, content.get("score_layers", []))),
        "seconds to measure": content.get("seconds"),
        "file": content["file"],
    }
