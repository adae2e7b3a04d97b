"""How far one prediction is from another: what calibrate and the bench measure with."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of one row of logits, float64 [vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats, from log probabilities; what the reference excludes adds nothing."""
    probable = reference > -np.inf
    return float(np.sum(np.exp(reference[probable]) * (reference[probable] - other[probable])))
