"""How like two models' answers are: arithmetic on arrays, of which the quality metrics and the agreement of runtimes are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def divergence(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """KL(reference‖candidate) in nats per row, of log-probabilities [T, V]; what rounding leaves below 0 is 0."""
    log_p = _restored(reference)
    found: NDArray[np.float64] = (np.exp(log_p) * (log_p - _restored(candidate))).sum(-1)
    return np.maximum(found, 0.0)


def _restored(logprobs: NDArray[Any]) -> NDArray[np.float64]:
    """What was kept as float16 made to sum to 1 again: then its rounding adds some 10⁻⁶ to a divergence, not its own size."""
    values = logprobs.astype(np.float64)
    if logprobs.dtype == np.float16:
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


def cosines(dot: NDArray[np.float64], signal: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per sample, of a·b, a·a and b·b; two vectors of zeros are alike (1), one of them is not (0)."""
    length = np.sqrt(signal * square)
    alike = (signal == square).astype(np.float64)
    return np.clip(np.where(length > 0, dot / np.where(length > 0, length, 1.0), alike), -1.0, 1.0)


def log_softmax(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Of scores [N, C]."""
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
