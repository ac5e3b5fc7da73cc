"""Intervals of shares and of ratios, for rows that come in clusters.

Questions about one picture are right or wrong together, so rows are not independent; pictures are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from trio.errors import UserError

RESAMPLES = 2000
Interval = tuple[float, float]
_BLOCK = 1 << 22
"""Numbers that a bootstrap draws at a time."""


def wilson_interval(successes: float, total: float, *, confidence: float = 0.95) -> Interval:
    """Bounds of a proportion (Wilson 1927), without a correction for continuity.

    Args:
        successes, total: of rows that are independent; need not be whole.

    Raises:
        UserError: no rows, or more successes than rows.
    """
    if not 0 <= successes <= total or not total:
        raise UserError(f"{successes} successes of {total}: no share")
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} is not between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == total else (centre + spread) / scale
    return low, high


def share_interval(hits: np.ndarray, clusters: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Bounds of a share of rows in clusters: Wilson's, with as many rows as the clusters are worth.

    That is rows over the design effect (Kish 1965, section 8.2), which is at least 1; the number of
    clusters where all rows are alike and it cannot be estimated.

    Args:
        hits: 0 or 1 for each row, `[R]`.
        clusters: the cluster of each row, `[R]`, as any ids.
    """
    clusters = numbered(clusters)
    n, count = len(hits), int(clusters.max()) + 1
    share = float(hits.mean())
    if count == n:
        worth = float(n)
    elif count == 1 or share in (0, 1):
        worth = float(count)
    else:
        variance = ratio_variance(hits, np.ones(n), clusters)
        worth = n / max(1.0, variance / (share * (1 - share) / n))
    return wilson_interval(share * worth, worth, confidence=confidence)


def ratio_variance(above: np.ndarray, below: np.ndarray, clusters: np.ndarray) -> float:
    """Of `above.sum() / below.sum()`, by linearisation (Cochran 1977, section 6.4).

    Args:
        above, below: a number for each row, `[R]`.
        clusters: the cluster of each row, `[R]`, numbered from 0; two or more.
    """
    residuals = by_cluster(above - above.sum() / below.sum() * below, clusters)
    count = len(residuals)
    return float(count / (count - 1) * np.square(residuals).sum() / below.sum() ** 2)


def numbered(ids: np.ndarray) -> np.ndarray:
    """The same clusters, numbered from 0 without holes: a number that no row has would count as a
    cluster without rows."""
    return np.unique(ids, return_inverse=True)[1]


def by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums of the rows of each cluster, `[C]`."""
    return np.bincount(clusters, weights=values)


class ClusteredBootstrap:
    """Draws whole clusters with replacement (Efron and Tibshirani 1993, chapters 8 and 13).

    All sums of a draw are of the same clusters: both sides of a ratio, and two runs that are
    compared, have to see the same pictures.

    Args:
        clusters: the cluster of each row, `[R]`, as any ids.
        seed: of the draws.
    """

    def __init__(self, clusters: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> None:
        self._clusters = numbered(clusters)
        self._count = int(self._clusters.max()) + 1
        self._seed = seed
        self._resamples = resamples
        few = self._count * resamples <= _BLOCK
        self._held = list(self._draw()) if few else None
        """The draws, where they are not too many to be held."""

    def _draw(self) -> Iterator[np.ndarray]:
        """How often each draw has each cluster, `[., C]`, some draws at a time."""
        rng = np.random.default_rng(self._seed)
        block = max(1, _BLOCK // self._count)
        for start in range(0, self._resamples, block):
            drawn = rng.integers(
                self._count, size=(min(block, self._resamples - start), self._count)
            )
            times = [np.bincount(each, minlength=self._count) for each in drawn]
            yield np.stack(times).astype(np.float64)

    def sums(self, *values: np.ndarray) -> np.ndarray:
        """Sums over each draw's rows, `[V, draws]`, of a number for each row, `[R]` each."""
        columns = np.stack([by_cluster(each, self._clusters) for each in values], axis=1)
        draws = self._draw() if self._held is None else self._held
        return np.concatenate([times @ columns for times in draws]).T

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval | None:
        """95 % interval of `above.sum() / below.sum()`.

        Args:
            above, below: one number for each row, `[R]`; 0 takes a row out.

        Returns:
            None where `below` sums up to nothing.
        """
        return of_quotients(*self.sums(above, below))


def of_quotients(above: np.ndarray, below: np.ndarray) -> Interval | None:
    """The middle 95 % of one sum over another in each draw, `[draws]` each, but for draws in which
    the lower one is nothing; None where it is that in all."""
    some = below > 0
    return percentiles(above[some] / below[some]) if some.any() else None


def percentiles(values: np.ndarray) -> Interval:
    """The middle 95 %."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
