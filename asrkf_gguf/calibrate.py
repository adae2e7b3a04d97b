"""`asrkf calibrate`: a model's calibration (calibration.py), or with --thorough the reference that it is judged by.

The reference runs the model many times. Sensitivity: for every layer with a KV cache, the KL divergence of the model's output when only that layer's
history is frozen to a fifth and all other layers keep everything, over a calibration text. Any change of the order of cells
makes some divergence by rounding; the least sensitive layer shows how much, and that is taken off. Scoring layers: with those
budgets and a third of the tokens active, the divergence with one scoring layer in each quarter of the depth. Beginning with
the engine's default, one quarter after the other takes its best layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import llama_cpp
import numpy as np
from tqdm import tqdm

from . import _native
from ._compat import quiet
from .calibration import TEXT_TOKENS, measure, read_tokens, standard_text, write_side_file
from .divergence import kl_divergence, log_softmax
from .family import loaded_model
from .models import MODEL_FORMS, resolve_model
from .stats import read_stats

STEP_TOKENS = 32  # tokens of a step: small, since freezing happens between steps
LEAST_CELLS = 256  # of the layer under test: the smallest pool
SCORER_TOKENS = 2048  # read to compare scoring layers: fewer leave budgets of one or two LEAST_CELLS


class Runner:
    """One loaded model, a new context with its own policy for each measurement."""

    def __init__(self, path: Path, n_tokens: int, threads: Optional[int], n_gpu_layers: int) -> None:
        self._policy("full")  # whatever LLAMA_KV_POLICY says
        self.llm = llama_cpp.Llama(
            str(path), n_ctx=n_tokens, n_batch=STEP_TOKENS, n_ubatch=STEP_TOKENS, n_gpu_layers=n_gpu_layers,
            n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False,
        )  # fmt: skip

    @staticmethod
    def _policy(text: str) -> None:
        """Of the next context."""
        _native.check(_native.lib.asrkf_next_context(_native.parse_config(text)))

    @contextlib.contextmanager
    def context(self, policy: str) -> Iterator[Any]:
        """A llama_context pointer, freed behind the with block."""
        self._policy(policy)
        context = llama_cpp.llama_init_from_model(self.llm.model, self.llm.context_params)
        if not context:
            raise RuntimeError(f"no context with {policy}: {_native.last_error() or 'llama.cpp gave no reason'}")
        try:
            yield context
        finally:
            with quiet():  # what upstream says of its buffers breaks the bar
                llama_cpp.llama_free(context)

    def served_layers(self) -> list[int]:
        """The layers that a calibration counts: those with a KV cache that see everything."""
        with self.context(f"window,pool={LEAST_CELLS},layers=shared") as context:
            texts = [group.layers for group in read_stats(context).groups if not group.sliding_window]
        ends = (part.partition("-")[::2] for text in texts for part in text.split("+"))
        return sorted(layer for first, last in ends for layer in range(int(first), int(last or first) + 1))

    def log_probabilities(self, policy: str, tokens: list[int], skip_tokens: int) -> np.ndarray:
        """log p of every output after the first skip_tokens: float32 [len(tokens) - skip_tokens, vocabulary]."""
        batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        n_vocab = self.llm.n_vocab()
        rows = np.empty((len(tokens) - skip_tokens, n_vocab), np.float32)
        try:
            with self.context(policy) as context:
                for begin in range(0, len(tokens), STEP_TOKENS):
                    step = tokens[begin : begin + STEP_TOKENS]
                    self._decode(context, batch, step, begin, begin >= skip_tokens)
                    if begin >= skip_tokens:
                        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(step), n_vocab))
                        rows[begin - skip_tokens : begin - skip_tokens + len(step)] = [log_softmax(row) for row in logits]
            return rows
        finally:
            llama_cpp.llama_batch_free(batch)

    @staticmethod
    def _decode(context: Any, batch: Any, tokens: list[int], begin: int, all_logits: bool) -> None:
        """One step of sequence 0 from position `begin` on; without all logits, those of the last token."""
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, begin + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status} at token {begin}: {_native.last_error() or 'llama.cpp gave no reason'}")


def mean_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(reference || other) in nats over positions; both are log probabilities [positions, vocabulary]."""
    return float(np.mean([kl_divergence(p.astype(np.float64), q.astype(np.float64)) for p, q in zip(reference, other, strict=True)]))


def without_rounding(measured: list[float]) -> list[float]:
    """Divergences less nine tenths of the smallest one; all stay positive."""
    floor = 0.9 * min(measured)
    return [max(value - floor, 1e-9) for value in measured]


def cut(tokens: list[int], n_tokens: int) -> tuple[list[int], int]:
    """The first tokens, and how many of them to skip: before that almost everything is active."""
    if len(tokens) < n_tokens:
        raise ValueError(f"the calibration text has {len(tokens)} tokens, {n_tokens} are needed: give a longer --text")
    return tokens[:n_tokens], n_tokens * 2 // 5 // STEP_TOKENS * STEP_TOKENS


def restricted(layer: int, cells: int, layers: list[int], n_tokens: int) -> str:
    """The policy that restricts one of the layers to so many cells; the others hold all n_tokens."""
    others = "+".join(str(other) for other in layers if other != layer)
    return f"asrkf,layers={layer}@{cells}{f'/{others}@{n_tokens}' if others else ''},score_layers={layer},rewalk_tokens=0"


def measure_sensitivities(runner: Runner, text: list[int], n_tokens: int, cells: int, layers: list[int]) -> list[float]:
    """Divergence, in nats, with so many of the tokens active in one layer; by layer."""
    tokens, skip = cut(text, n_tokens)
    reference = runner.log_probabilities("full", tokens, skip)
    policies = (restricted(layer, cells, layers, n_tokens) for layer in tqdm(layers, desc="sensitivities", unit="layer", file=sys.stderr))
    return [mean_divergence(reference, runner.log_probabilities(policy, tokens, skip)) for policy in policies]


def choose_scoring_layers(runner: Runner, text: list[int], content: dict[str, Any], layers: list[int]) -> tuple[list[int], list[dict[str, Any]]]:
    """The layers, and every set that was tried with its divergence in nats."""
    tokens, skip = cut(text, SCORER_TOKENS)
    chosen = [layers[i] for i in _native.default_score_layers(len(layers))]
    tried: dict[tuple[int, ...], float] = {}
    n = len(chosen)
    # a quarter's layers, and where the search begins, which in a small model may lie beside it
    candidates = [sorted({*layers[i * len(layers) // n : (i + 1) * len(layers) // n], layer}) for i, layer in enumerate(chosen)]
    n_sets = sum(map(len, candidates)) - n + 1
    with tempfile.TemporaryDirectory() as folder, tqdm(total=n_sets, desc="scoring layers", unit="set", file=sys.stderr) as bar:
        budgets = Path(folder) / "budgets.json"
        budgets.write_text(json.dumps({**content, "score_layers": chosen}))
        reference = runner.log_probabilities("full", tokens, skip)

        def loss(scoring: list[int]) -> float:
            key = tuple(sorted(set(scoring)))
            if key not in tried:
                policy = f"asrkf,pool={SCORER_TOKENS * 3 // 8},calibration={budgets},score_layers={'+'.join(map(str, key))},rewalk_tokens=0"
                tried[key] = mean_divergence(reference, runner.log_probabilities(policy, tokens, skip))
                bar.update()
            return tried[key]

        for i, of_quarter in enumerate(candidates):
            chosen = min(([*chosen[:i], layer, *chosen[i + 1 :]] for layer in of_quarter), key=loss)
    return sorted(set(chosen)), [{"layers": list(scoring), "kl": kl} for scoring, kl in tried.items()]


def calibrate_thoroughly(path: Path, text: str, n_tokens: int = 1280, threads: Optional[int] = None, n_gpu_layers: int = -1) -> dict[str, Any]:
    """Measure every layer; returns the side file's content. ValueError if the text is too short, or n_tokens < 1280."""
    if n_tokens < 5 * LEAST_CELLS or n_tokens % LEAST_CELLS:
        raise ValueError(f"tokens={n_tokens}: a multiple of {LEAST_CELLS}, at least {5 * LEAST_CELLS}")
    n_most = max(n_tokens, SCORER_TOKENS)
    runner = Runner(path, n_most, threads, n_gpu_layers)
    tokens = runner.llm.tokenize(text[: 16 * n_most].encode())
    cut(tokens, n_most)  # before the minutes that the first half takes
    layers = runner.served_layers()
    began = time.perf_counter()
    cells = n_tokens // 5 // LEAST_CELLS * LEAST_CELLS
    measured = measure_sensitivities(runner, tokens, n_tokens, cells, layers)
    content: dict[str, Any] = {
        "format": "asrkf-calibration",
        "version": 2,
        "model": _native.fingerprint(runner.llm.model),
        "sensitivities": without_rounding(measured),
        "measured": measured,
        "unit": f"KL in nats with {cells} of {n_tokens} tokens active in one layer",
    }
    content["score_layers"], content["score_layers_tried"] = choose_scoring_layers(runner, tokens, content, layers)
    content["seconds"] = round(time.perf_counter() - began, 1)
    runner.llm.close()
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_FORMS)
    parser.add_argument("--text", help="a text file; default: the standard library's pydoc_data.topics")
    parser.add_argument("--thorough", action="store_true", help="run the model once for each layer and each set of scoring layers: minutes to hours")
    parser.add_argument("--tokens", type=int, help=f"tokens of the text (default {TEXT_TOKENS}; thorough: 1280, for the sensitivities)")
    parser.add_argument("--out", help="the side file (default: in the cache folder, where Llama and llama.cpp's programs find it)")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")


def calibrate_quickly(path: Path, text: str, n_tokens: int = TEXT_TOKENS, threads: Optional[int] = None, n_gpu_layers: int = -1) -> dict[str, Any]:
    """The side file's content by one pass; ValueError or KVError says what is against it."""
    with loaded_model(path, n_gpu_layers=n_gpu_layers if n_gpu_layers >= 0 else 0x7FFFFFFF) as model:
        return measure(model, read_tokens(model, text, n_tokens), threads)


def cached_file(path: Path, n_gpu_layers: int) -> Path:
    with loaded_model(path, n_gpu_layers=n_gpu_layers if n_gpu_layers >= 0 else 0x7FFFFFFF) as model:
        return _native.calibration_file(model)


def main(arguments: argparse.Namespace) -> int:
    path = resolve_model(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8", errors="replace") if arguments.text else standard_text()
    method = calibrate_thoroughly if arguments.thorough else calibrate_quickly
    tokens = {} if arguments.tokens is None else {"n_tokens": arguments.tokens}
    content = {
        **method(path, text, threads=arguments.threads, n_gpu_layers=arguments.n_gpu_layers, **tokens),
        "model_file": path.name,
        "model_file_bytes": path.stat().st_size,
    }
    target = Path(arguments.out) if arguments.out else cached_file(path, 0)
    write_side_file(target, content)
    ranked = sorted(range(len(content["sensitivities"])), key=lambda i: -content["sensitivities"][i])
    most, scoring = (", ".join(map(str, layers)) for layers in (ranked[:8], content["score_layers"]))
    print(f"most sensitive of the layers that see everything, counted from 0: {most}; scoring: {scoring}")
    how = f"programs take calibration={target} in LLAMA_KV_POLICY" if arguments.out else "Llama and llama.cpp's programs find it there"
    print(f"{target} written in {content['seconds']} s; {how}")
    return 0
