"""Trains one layer's gate on its features. Layers do not depend on each other.

As published: binary cross-entropy against the teacher's score, mean over tokens and sum over heads; SGD with momentum 0.9, learning rate
0.2; five passes of 1000 steps, each with random tokens; the rate rises over the first 1 % of the steps, is halved behind half of them and
once more behind three quarters. Every hundredth token is held out. What differs: the gate's bias is added once, as wherever gates are
used (the published training adds it twice). And batches are as small as it takes for 1000 of them, where the paper has 1000 tokens of a
million: with 1000 tokens of a shorter text, there were so few steps that gates did not get far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .file import DIM, NORM_EPS, SINKS, Gate
from .graph import LayerShape
from .pytorch import import_torch

EPOCHS, EPOCH_STEPS = 5, 1000
MOST_BATCH, LEAST_BATCH = 1000, 32  # tokens
LEARNING_RATE, MOMENTUM = 0.2, 0.9
HOLD_OUT = 100  # one of so many tokens
WORTH_KEEPING = 0.05  # a score that is


@dataclass(frozen=True)
class Figures:
    """On the held-out tokens."""

    loss: float
    mean_loss: float
    """Of a gate that gives every token its head's mean."""
    agreement: float
    """Share of (token, head) where gate and teacher agree on whether the score is worth keeping."""
    mean_agreement: float
    """Of the answer that is more often right."""
    rank_correlation: float
    """Of gate and teacher, mean over heads: 1 is the same order."""


def held_out(n_tokens: int) -> np.ndarray:
    return np.arange(n_tokens) % HOLD_OUT == HOLD_OUT - 1


def learning_rate(step: int, n_steps: int) -> float:
    warm_up = max(1, n_steps // 100)
    if step < warm_up:
        return LEARNING_RATE * 0.5 * (step + 1) / warm_up
    return LEARNING_RATE * (1.0 if step < n_steps / 2 else 0.5 if step < n_steps * 3 / 4 else 0.25)


def forward(torch: Any, p: dict[str, Any], x: Any) -> Any:
    """Scores of a batch, [tokens, KV heads], as Gate.scores() computes them."""
    n_heads, _, dim = p["sinks"].shape
    group = p["bias"].shape[1]

    def normalised(value: Any) -> Any:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + NORM_EPS)

    q = normalised(torch.nn.functional.linear(x, p["q_weight"], p["q_bias"]).view(-1, n_heads, group, dim)) * p["q_norm"]
    k = normalised(torch.nn.functional.linear(x, p["k_weight"]).view(-1, n_heads, 1, dim)) * p["k_norm"]
    own = (q * k).sum(-1) / dim**0.5 + p["bias"]
    others = torch.einsum("nhgd,hsd->nhgs", q, p["sinks"]) / dim**0.5
    return torch.sigmoid(own - torch.logsumexp(others, -1)).mean(-1)


def initial(torch: Any, shape: LayerShape, generator: Any) -> dict[str, Any]:
    """PyTorch's own for the linear layers; norms 1, sinks and bias 0."""

    def uniform(*size: int) -> Any:
        return torch.empty(*size).uniform_(-(shape.n_embd**-0.5), shape.n_embd**-0.5, generator=generator)

    n_heads, group = shape.n_heads_kv, shape.group
    return {
        "q_weight": uniform(n_heads * group * DIM, shape.n_embd), "q_bias": uniform(n_heads * group * DIM),
        "k_weight": uniform(n_heads * DIM, shape.n_embd), "q_norm": torch.ones(DIM), "k_norm": torch.ones(DIM),
        "sinks": torch.zeros(n_heads, SINKS, DIM), "bias": torch.zeros(n_heads, group),
    }  # fmt: skip


def fit_gate(inputs: np.ndarray, targets: np.ndarray, shape: LayerShape, seed: int) -> Gate:
    """Of one layer, from its features; the same for the same seed on one thread.

    RuntimeError if it comes to nothing finite.
    """
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(np.flatnonzero(~held_out(len(inputs))))
    x, target = torch.from_numpy(inputs), torch.from_numpy(targets)
    batch_tokens = min(MOST_BATCH, max(LEAST_BATCH, len(rows) // EPOCH_STEPS))
    n_batches = len(rows) // batch_tokens
    n_steps = EPOCHS * n_batches
    parameters = {name: value.requires_grad_() for name, value in initial(torch, shape, generator).items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for step in range(n_steps):
        if step % n_batches == 0:
            order = rows[torch.randperm(len(rows), generator=generator)]
        batch = order[step % n_batches * batch_tokens :][:batch_tokens]
        for options in optimizer.param_groups:
            options["lr"] = learning_rate(step, n_steps)
        scores = forward(torch, parameters, x[batch].float())
        loss = torch.nn.functional.binary_cross_entropy(scores, target[batch].clamp(0, 1), reduction="sum") / batch_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    try:
        return Gate(**{name: value.detach().numpy().copy() for name, value in parameters.items()})
    except ValueError as error:
        raise RuntimeError(f"the training came to nothing ({error}): try another --seed or more --tokens") from error


def cross_entropy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over tokens, sum over heads."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-(targets * np.log(p) + (1 - targets) * np.log1p(-p)).mean(0).sum())


def judge(gate: Gate, inputs: np.ndarray, targets: np.ndarray) -> Figures:
    """On the tokens that fit_gate() did not see."""
    out = held_out(len(inputs))
    scores, wanted = gate.scores(inputs[out]), targets[out]
    worth = wanted >= WORTH_KEEPING
    ranks = [np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1] for a, b in zip(scores.T, wanted.T, strict=True)]
    return Figures(
        loss=cross_entropy(scores, wanted),
        mean_loss=cross_entropy(np.broadcast_to(targets[~out].mean(0), wanted.shape), wanted),
        agreement=float(((scores >= WORTH_KEEPING) == worth).mean()),
        mean_agreement=float(np.maximum(worth.mean(0), 1 - worth.mean(0)).mean()),
        rank_correlation=float(np.mean(ranks)),
    )
