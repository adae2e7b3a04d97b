"""How far one prediction is from another: what calibrate and the bench measure with."""

from __future__ import annotations

import numpy as np
import scipy.special


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of one row of logits, float64 [vocabulary]."""
    return scipy.special.log_softmax(logits.astype(np.float64))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats, from log probabilities; what the reference excludes adds nothing."""
    return float(scipy.special.rel_entr(np.exp(reference), np.exp(other)).sum())
