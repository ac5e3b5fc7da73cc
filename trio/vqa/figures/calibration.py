"""Whether a model is right as often as it is sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trio.errors import UserError

BINS = 15
SMALL = 30
"""Answers of a bin; with fewer, its share right says little."""


def calibration(
    confidences: np.ndarray | Sequence[float],
    right: np.ndarray | Sequence[bool],
    *,
    bins: int = BINS,
) -> dict[str, Any]:
    """The expected calibration error, and the bins it is made of (Guo et al. 2017, arXiv
    1706.04599, section 3: bins of equal width, open below and closed above).

    Args:
        confidences: the largest probability of a choice of each row, `[R]`, 0 to 1.
        right: whether that choice is right, `[R]`.

    Returns:
        An object for JSON: `n`; `ece`, the mean over the rows of how far their bin's share right is
        from its mean confidence, None of no rows; and `bins`, each with `low`, `high`, `n`,
        `confidence` and `accuracy` (means, None of no rows) and `small`.

    Raises:
        UserError: no bins, more of one than of the other, or numbers that are no such thing.
    """
    sure, hits = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    if bins < 1:
        raise UserError(f"bins {bins}: at least 1 is needed")
    if sure.ndim != 1 or sure.shape != hits.shape:
        raise UserError(f"{sure.size} confidences, but {hits.size} answers that are right or wrong")
    if not ((sure >= 0) & (sure <= 1)).all():
        raise UserError("a confidence is not between 0 and 1")
    if not np.isin(hits, (0, 1)).all():
        raise UserError("an answer is neither right nor wrong")
    edges = np.linspace(0, 1, bins + 1)
    places = np.searchsorted(edges[1:-1], sure)
    counts = np.bincount(places, minlength=bins)
    confidence, accuracy = (
        np.bincount(places, weights=values, minlength=bins) / np.maximum(counts, 1)
        for values in (sure, hits)
    )
    gaps = counts * np.abs(accuracy - confidence)
    return {
        "n": len(sure),
        "ece": float(gaps.sum() / len(sure)) if len(sure) else None,
        "bins": [
            {
                "low": float(edges[place]),
                "high": float(edges[place + 1]),
                "n": int(count),
                "confidence": float(confidence[place]) if count else None,
                "accuracy": float(accuracy[place]) if count else None,
                "small": bool(count < SMALL),
            }
            for place, count in enumerate(counts)
        ],
    }
