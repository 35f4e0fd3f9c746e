"""The learning rate across rounds: a line or a half cosine over all steps of the run."""

from __future__ import annotations

import math


def learning_rate(peak: float, final_share: float, progress: float, shape: str) -> float:
    """Learning rate at a point of the run.

    Args:
        peak: at the start.
        final_share: rate at the end, as a share of the peak.
        progress: how much of the run is done, 0..1.
        shape: `constant`, `linear` or `cosine`.
    """
    if shape == "constant":
        return peak
    decay = progress if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return peak * (1.0 - (1.0 - final_share) * decay)
