"""Gates for a model, trained on what its own attention does with a text. The model itself only runs forward."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import llama_cpp
import numpy as np
from tqdm import tqdm

from .. import _native
from ..family import loaded_model
from ..files import written_whole
from .features import Features, cut_documents
from .file import Gate, Gates
from .fit import Figures, fit_gate, judge
from .graph import layer_shapes
from .pytorch import import_torch
from .teacher import CHUNK_TOKENS, Instructions, Plan

TOKENS = 150_000
SAY = Callable[[str], None]


def train(
    path: Path, texts: Sequence[str], n_tokens: int = TOKENS, work_folder: Optional[Path] = None, threads: Optional[int] = None,
    n_gpu_layers: int = -1, seed: int = 0, say: SAY = print, chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Gates, dict[int, Figures], Features]:  # fmt: skip
    """The gates, how good they are by layer, and what is left in the work folder: for the caller to delete once the gates are kept.

    ValueError, RuntimeError or OSError says what is against it. What was finished before an interruption is not done again.
    """
    torch = import_torch()  # before the minutes that the rest takes
    if threads:
        torch.set_num_threads(threads)
    with loaded_model(path, n_gpu_layers=n_gpu_layers if n_gpu_layers >= 0 else 0x7FFFFFFF) as model:
        features = prepare(model, path, texts, n_tokens, work_folder, threads, chunk_tokens)
        say(costs(features))
        n_decoded = features.tokens_to_decode(Instructions.of(model))
        with bar("reading", n_decoded, "token") as step:
            features.collect(model, threads, step)
        model_fingerprint = _native.fingerprint(model)
    layers, figures = {}, {}
    with bar("training", len(features.shapes), "layer") as step:
        for il in features.shapes:
            layers[il], figures[il] = trained_layer(features, il, seed)
            step(1)
    agreement = float(np.mean([figure.agreement for figure in figures.values()]))
    source = f"asrkf gates train, seed {seed}"
    return Gates(model_fingerprint, layers, source, features.n_tokens, agreement), figures, features


def prepare(
    model: Any, path: Path, texts: Sequence[str], n_tokens: int, work_folder: Optional[Path], threads: Optional[int], chunk_tokens: int
) -> Features:
    """What there is to do, once it is known that it can be done."""
    instructions = Instructions.of(model)
    plan = Plan.of(llama_cpp.llama_model_n_ctx_train(model), instructions.most_tokens, chunk_tokens)
    documents = cut_documents(model, texts, n_tokens, plan)
    fingerprint = _native.fingerprint(model)
    folder = (work_folder or _native.gates_file(model).parent) / f"{fingerprint}.work"
    features = Features(folder, layer_shapes(model, threads), documents, plan, f"{fingerprint}, {path.stat().st_size} bytes")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if (needed := features.bytes_to_write()) > free:
        raise RuntimeError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the features need {needed / 1e9:.1f} GB: "
            f"give fewer --tokens (now {features.n_tokens}), or another --work-folder"
        )
    return features


def costs(features: Features) -> str:
    """In one line, before it begins."""
    n, largest = features.n_tokens, max(2 * shape.n_embd + 4 * shape.n_heads_kv for shape in features.shapes.values())
    done = features.n_finished()
    return (
        f"{n} tokens in {len(features.documents)} documents, {f'{done} of them done before' if done else 'none done before'}; "
        f"{len(features.shapes)} layers; on disk, until the end: {features.token_bytes * n / 1e9:.2f} GB in {features.folder}; "
        f"in memory besides the model: a cache of {features.plan.n_ctx} tokens, then {largest * n / 1e9:.2f} GB for one layer at a time"
    )


def trained_layer(features: Features, il: int, seed: int) -> tuple[Gate, Figures]:
    """From the work folder, if it was trained before an interruption."""
    kept = features.folder / f"gate-{il}-{seed}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = dict(np.load(kept))
        figures = Figures(**json.loads(str(found.pop("figures"))))
        return Gate(**found), figures
    inputs, targets = features.read(il)
    gate = fit_gate(inputs, targets, features.shapes[il], 1000 * seed + il)
    figures = judge(gate, inputs, targets)
    with written_whole(kept) as part, part.open("wb") as file:
        np.savez(file, figures=json.dumps(asdict(figures)), **asdict(gate))
    return gate, figures


@contextlib.contextmanager
def bar(name: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """A progress bar; hands out what advances it."""
    with tqdm(total=total, desc=name, unit=unit, file=sys.stderr, disable=total == 0) as shown:
        yield shown.update
