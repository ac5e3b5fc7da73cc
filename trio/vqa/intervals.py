"""Intervals of shares and of ratios, for rows that come in clusters.

Questions about one picture are right or wrong together, so rows are not independent; pictures are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

from trio.errors import UserError

RESAMPLES = 2000
Interval = tuple[float, float]
_MANY = 1000
"""Rows of the rarer kind, from which on no exact interval is needed."""
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
    worth = _worth(hits, clusters)
    return wilson_interval(float(hits.mean()) * worth, worth, confidence=confidence)


def _worth(hits: np.ndarray, clusters: np.ndarray) -> float:
    """How many independent rows say as much as these."""
    clusters = numbered(clusters)
    n, count = len(hits), int(clusters.max()) + 1
    share = float(hits.mean())
    if count == n:
        return float(n)
    if count == 1 or share in (0, 1):
        return float(count)
    variance = ratio_variance(hits, np.ones(n), clusters)
    return n / max(1.0, variance / (share * (1 - share) / n))


def finite_share_interval(
    hits: np.ndarray, clusters: np.ndarray, *, population: int, confidence: float = 0.95
) -> Interval:
    """Bounds of a share over a finite set of rows, of which some were drawn one by one.

    The wider of two: Wilson's with the clusters' design effect and the finite population correction
    (Cochran 1977, section 2.6), and the exact one of rows drawn without replacement (the
    hypergeometric test inverted, as Clopper and Pearson 1934), which holds where next to nothing
    differs.

    Args:
        hits: 0 or 1 for each drawn row, `[R]`.
        clusters: the cluster of each, `[R]`, as any ids.
        population: rows that they were drawn from.
    """
    n, found = len(hits), int(hits.sum())
    if not 0 < n <= population:
        raise UserError(f"{n} rows of {population} were drawn: no share")
    if n == population:
        return found / n, found / n
    share = float(hits.mean())
    worth = _worth(hits, clusters) / (1 - n / population)
    around = wilson_interval(share * worth, worth, confidence=confidence)
    if min(found, n - found) > _MANY:
        return around
    if found > n - found:
        low, high = _hypergeometric(n - found, n, population, confidence)
        low, high = 1 - high, 1 - low
    else:
        low, high = _hypergeometric(found, n, population, confidence)
    return max(0.0, min(low, around[0])), min(1.0, max(high, around[1]))


def _hypergeometric(found: int, drawn: int, population: int, confidence: float) -> Interval:
    """Shares of a population under which so few, or so many, as `found` are not too unlikely."""
    least = (1 - confidence) / 2

    def at_most(count: int, marked: int) -> float:
        """Chance that at most `count` of the drawn rows are marked."""
        terms = [
            _log_choose(marked, k)
            + _log_choose(population - marked, drawn - k)
            - _log_choose(population, drawn)
            for k in range(max(0, drawn - population + marked), min(count, marked) + 1)
        ]
        return math.fsum(map(math.exp, terms))

    low = _first(
        lambda marked: 1 - at_most(found - 1, marked) > least, found, population - drawn + found
    )
    high = _first(lambda marked: at_most(found, marked) <= least, low, population) - 1
    return low / population, high / population


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first whole number for which something holds that goes on holding; one more than the
    last if it does for none."""
    while low <= high:
        middle = (low + high) // 2
        low, high = (low, middle - 1) if holds(middle) else (middle + 1, high)
    return low


def _log_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


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
