"""Pairs or tokens: what a policy loses because the heads of a layer share its cells.

Fast KVzip (arXiv 2601.17668) chooses pairs of K and V: each KV head keeps its own tokens. Our cells hold a token for all heads of a layer, so
`kvzip` chooses tokens. Here both are masks, in a model computed by NumPy: a prompt is read exactly, a part of its pairs is masked in every
layer, and the predictions of the tokens after it are compared with those without a mask. Nothing of the engine is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from ..calibration import read_tokens
from ..divergence import kl_divergence, log_softmax
from ..family import loaded_model
from ..gates.file import Gates, default_file, read_gates
from ..texts import load_texts
from .measure import standard_error
from .records import DESCRIPTION, Table, describe, results_file
from .tables import made_by, markdown, newest

PAIRS = [*DESCRIPTION, "text", "length", "positions", "score", "chosen", "kept_ratio", "kl_mean", "kl_se", "kl_p99", "top1_ratio", "run"]
SINKS, WINDOW_RATIO = 4, 0.02  # never masked: the first tokens, and the last fiftieth of a prompt (the paper's window)
RATIOS = (0.5, 1 / 3, 0.25, 0.125)


@dataclass(frozen=True)
class Layer:
    """Weights as the file has them, float32 [out, in]."""

    attn_norm: np.ndarray
    attn_q: np.ndarray
    attn_k: np.ndarray
    attn_v: np.ndarray
    attn_output: np.ndarray
    ffn_norm: np.ndarray
    ffn_gate: np.ndarray
    ffn_up: np.ndarray
    ffn_down: np.ndarray


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * weight


class Model:
    """A model of the architecture llama, with all K and V of what it has read."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

        def key(name: str, default: Any = None) -> Any:
            field = reader.get_field(name)
            return default if field is None else field.contents()

        if key("general.architecture") != "llama" or "rope_freqs.weight" in self.tensors or "llama.rope.scaling.type" in reader.fields:
            raise ValueError(f"{path.name}: masks of pairs are computed for models of the architecture llama without scaled positions only")
        self.n_heads, self.n_heads_kv = key("llama.attention.head_count"), key("llama.attention.head_count_kv")
        self.eps, self.rope_base = key("llama.attention.layer_norm_rms_epsilon"), key("llama.rope.freq_base", 10000.0)
        self.embeddings = self.tensor("token_embd.weight")
        self.output = self.tensor("output.weight") if "output.weight" in self.tensors else self.embeddings
        self.output_norm = self.tensor("output_norm.weight")
        names = Layer.__dataclass_fields__
        self.layers = [
            Layer(**{name: self.tensor(f"blk.{il}.{name}.weight") for name in names}) for il in range(key("llama.block_count"))
        ]  # fmt: skip
        self.head = len(self.layers[0].attn_k) // self.n_heads_kv
        self.clear()

    def tensor(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def clear(self) -> None:
        self.keys: list[np.ndarray] = [np.empty((self.n_heads_kv, 0, self.head), np.float32) for _ in self.layers]
        self.values = list(self.keys)
        self.inputs: list[np.ndarray] = [np.empty((0, self.embeddings.shape[1]), np.float32) for _ in self.layers]
        """Of each layer, behind its norm: what gates read."""

    def rotated(self, x: np.ndarray, first: int) -> np.ndarray:
        """[heads, tokens, head] behind RoPE, neighbours being a pair (ggml's NORM)."""
        angles = np.arange(first, first + x.shape[1])[:, None] * self.rope_base ** (-np.arange(0, self.head, 2) / self.head)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)

    def read(self, tokens: list[int], masked: np.ndarray | None = None, peaks: np.ndarray | None = None) -> np.ndarray:
        """Logits of the next token behind each of these, [tokens, vocabulary].

        masked: bool [layers, KV heads, earlier tokens], pairs that these tokens do not see. peaks: the same shape, float; gets the highest
        weight that any of these tokens' queries gives to each.
        """
        n_seen = self.keys[0].shape[1]
        future = np.triu(np.full((len(tokens), len(tokens)), -np.inf, np.float32), 1)
        x = self.embeddings[tokens]
        for il, layer in enumerate(self.layers):
            h = rms_norm(x, layer.attn_norm, self.eps)

            def heads(weight: np.ndarray, n: int, h: np.ndarray = h) -> np.ndarray:
                return (h @ weight.T).reshape(len(tokens), n, self.head).transpose(1, 0, 2)

            q = self.rotated(heads(layer.attn_q, self.n_heads), n_seen) / np.float32(np.sqrt(self.head))
            k = np.concatenate((self.keys[il], self.rotated(heads(layer.attn_k, self.n_heads_kv), n_seen)), 1)
            v = np.concatenate((self.values[il], heads(layer.attn_v, self.n_heads_kv)), 1)
            attended = np.empty((len(tokens), self.n_heads, self.head), np.float32)
            for i in range(self.n_heads):
                group = i * self.n_heads_kv // self.n_heads
                weights = q[i] @ k[group].T
                weights[:, n_seen:] += future
                if masked is not None:
                    weights[:, :n_seen][:, masked[il, group]] = -np.inf
                weights = np.exp(weights - weights.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                if peaks is not None:
                    peaks[il, group] = np.maximum(peaks[il, group], weights[:, :n_seen].max(0))
                attended[:, i] = weights @ v[group]
            if masked is None and peaks is None:  # what was read under a mask, or only to look, is not kept
                self.keys[il], self.values[il], self.inputs[il] = k, v, np.concatenate((self.inputs[il], h))
            x = x + attended.reshape(len(tokens), -1) @ layer.attn_output.T
            h = rms_norm(x, layer.ffn_norm, self.eps)
            gate = h @ layer.ffn_gate.T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer.ffn_up.T)) @ layer.ffn_down.T
        return rms_norm(x, self.output_norm, self.eps) @ self.output.T


#
# who is kept
#


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Of any shape: true for the n highest; of equal ones the later."""
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(scores, axis=None, kind="stable")[scores.size - n :]] = True
    return kept.reshape(scores.shape)


def by_pair(scores: np.ndarray, ratio: float) -> np.ndarray:
    """The paper's: one threshold over all layers, heads and tokens."""
    return best(scores, round(ratio * scores.size))


def by_pair_of_layer(scores: np.ndarray, ratio: float) -> np.ndarray:
    """As many pairs in each layer."""
    return np.stack([by_pair(layer, ratio) for layer in scores])


def by_pair_of_head(scores: np.ndarray, ratio: float) -> np.ndarray:
    """As many pairs in each head: what fixed pools could hold if each head had its own cells."""
    return np.stack([by_pair_of_layer(layer, ratio) for layer in scores])


def by_token_of_layer(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Ours with equal pools: in each layer the tokens whose best head scores most, for all heads."""
    kept = by_pair_of_layer(scores.max(1), ratio)
    return np.broadcast_to(kept[:, None], scores.shape)


def by_token(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Ours with one threshold: tokens of any layer compete, and layers differ in how many they keep."""
    return np.broadcast_to(by_pair(scores.max(1), ratio)[:, None], scores.shape)


CHOICES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "pairs, one threshold": by_pair, "pairs, by layer": by_pair_of_layer, "pairs, by head": by_pair_of_head,
    "tokens, one threshold": by_token, "tokens, by layer": by_token_of_layer,
}  # fmt: skip


def gate_scores(model: Model, gates: Gates) -> np.ndarray:
    """[layers, KV heads, tokens], of what the model has read."""
    return np.stack([gates.layers[il].scores(inputs).T for il, inputs in enumerate(model.inputs)])


class Pairs:
    """One text: the prompt's K and V, the predictions behind it, and what masks make of them."""

    def __init__(self, model: Model, gates: Gates, tokens: list[int], positions: int) -> None:
        model.clear()
        self.model, self.tokens = model, tokens[-positions:]
        prompt = tokens[:-positions]
        model.read(prompt)
        shape = (len(model.layers), model.n_heads_kv, len(prompt))
        self.scores = {"gates": gate_scores(model, gates), "hindsight": np.zeros(shape, np.float32)}
        self.reference = [log_softmax(row) for row in model.read(self.tokens, peaks=self.scores["hindsight"])]
        for scores in self.scores.values():
            scores[..., :SINKS] = scores[..., len(prompt) - round(WINDOW_RATIO * len(prompt)) :] = 2

    def measure(self, score: str, chosen: str, ratio: float) -> dict[str, float]:
        masked = ~CHOICES[chosen](self.scores[score], ratio)
        found = [log_softmax(row) for row in self.model.read(self.tokens, masked=masked)]
        kl = np.array([kl_divergence(one, other) for one, other in zip(self.reference, found, strict=True)])
        agree = [one.argmax() == other.argmax() for one, other in zip(self.reference, found, strict=True)]
        return {
            "kl_mean": float(kl.mean()), "kl_se": standard_error(kl), "kl_p99": float(np.percentile(kl, 99)), "top1_ratio": float(np.mean(agree)),
        }  # fmt: skip


def pairs(arguments: argparse.Namespace) -> int:
    file = default_file(arguments.model)
    if not file.exists():
        raise ValueError(f"{arguments.model.name} has no gates: asrkf gates train makes them")
    if not 0 < arguments.positions < arguments.length:
        raise ValueError(f"--positions {arguments.positions}: fewer than --length {arguments.length}")
    model, gates, table = Model(arguments.model), read_gates(file), Table(arguments.out or results_file("pairs.csv"), PAIRS, arguments.again)
    todo = [(score, chosen, ratio) for ratio in RATIOS for score in ("gates", "hindsight") for chosen in CHOICES]
    about_run = [arguments.model.name, hashlib.sha256(file.read_bytes()).hexdigest(), arguments.positions]
    lines = []
    for name, text in load_texts(arguments.text).items():
        with loaded_model(arguments.model, vocab_only=True) as vocabulary:
            tokens = read_tokens(vocabulary, text[len(text) // 5 :], arguments.length)
        runs = {one: hashlib.sha256(json.dumps([*about_run, tokens, *one]).encode()).hexdigest()[:16] for one in todo}
        missing = [one for one in todo if not table.find(runs[one])]
        of_text = Pairs(model, gates, tokens, arguments.positions) if missing else None
        for one in tqdm(missing, desc=name, unit="mask", disable=None):
            figures = of_text.measure(*one)  # type: ignore[union-attr]
            about = {"text": name, "length": arguments.length, "positions": arguments.positions, "score": one[0], "chosen": one[1]}
            row = {key: f"{value:.6g}" for key, value in {"kept_ratio": one[2], **figures}.items()}
            table.add({**describe(arguments), **about, **row, "run": runs[one]})
        lines += [[name, *one[:2], *(float(table.find(runs[one])[key]) for key in ("kept_ratio", "kl_mean", "top1_ratio"))] for one in todo]  # type: ignore[index]
    print(tabulate(lines, ["text", "score", "chosen", "kept", "mean KL", "top-1"], floatfmt=".4f"))
    print(f"rows in {table.path}")
    return 0


def table_of_pairs(_arguments: argparse.Namespace) -> int:
    rows = newest(results_file("pairs.csv"), "model", "text", "length", "positions", "score", "chosen", "kept_ratio")
    texts = list(dict.fromkeys(row["text"] for row in rows))
    cells = []
    for key in dict.fromkeys((row["kept_ratio"], row["score"], row["chosen"]) for row in rows):
        of_key = {row["text"]: float(row["kl_mean"]) for row in rows if (row["kept_ratio"], row["score"], row["chosen"]) == key}
        cells.append((f"{float(key[0]):.3f}", key[1], key[2], f"{np.mean(list(of_key.values())):.4f}", *(f"{of_key[text]:.4f}" for text in texts)))
    print("\n".join([*markdown(("kept", "score", "chosen", "KL, mean", *texts), cells), *made_by(rows)]))
    return 0
