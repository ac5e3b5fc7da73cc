"""95 % intervals: of shares, and of what a setting keeps of another's right answers."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000
Interval = tuple[float, float]


def wilson(hits: int, n: int, z: float = 1.959964) -> Interval:
    """Of a share (Wilson 1927), without a correction for continuity."""
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


class ClusteredBootstrap:
    """Percentile intervals of ratios, for requests that come in clusters.

    Whole clusters are drawn with replacement (Efron and Tibshirani 1993, chapters 8 and 13), the
    same ones for all ratios: questions about one scene are right or wrong together, and both sides
    of a ratio have to see the same scenes.

    Args:
        clusters: the cluster of each request, `[R]`, numbered from 0.
        seed: of the draws.
    """

    def __init__(self, clusters: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> None:
        self._clusters = clusters
        self._count = int(clusters.max()) + 1
        even = np.full(self._count, 1 / self._count)
        drawn = np.random.default_rng(seed).multinomial(self._count, even, size=resamples)
        self._times_RC = drawn.astype(np.float64)
        """How often each resample has each cluster."""

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval | None:
        """Interval of `above.sum() / below.sum()`.

        Args:
            above, below: one number for each request, `[R]`; 0 takes a request out.

        Returns:
            None where `below` sums up to nothing.
        """
        if not below.any():
            return None
        sums = [self._times_RC @ self._by_cluster(values) for values in (above, below)]
        ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]
        low, high = np.percentile(ratios, (2.5, 97.5))
        return float(low), float(high)

    def _by_cluster(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._clusters, weights=values, minlength=self._count)
