"""Counts of numbers on a grid: bounded by the grid, whatever the number of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LOWEST = 1e-4
"""Where a logarithmic grid begins."""
MOST_PLACES = 1 << 20
BARS = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """What is drawn of a histogram."""

    middle: np.ndarray
    """Of each bar, `[B]`."""
    width: np.ndarray
    """`[B]`; in decades on a logarithmic axis."""
    count: np.ndarray
    """Values in it, `[B]`."""
    log: bool
    """Whether bars are equally wide on a logarithmic axis."""


@dataclass(kw_only=True, slots=True)
class Histogram:
    """Counts of values from 0 on; values that are not finite are left out."""

    step: float = 1.0
    """Of a linear grid, to which values are rounded."""
    per_decade: int = 0
    """Above 0: of a logarithmic grid from `LOWEST` on, places for a factor of ten."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """By place, `[P]`."""
    n: int = 0
    total: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count values, `[R]`."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        if self.per_decade:
            places = np.log10(np.maximum(values, LOWEST) / LOWEST) * self.per_decade
        else:
            places = np.maximum(values, 0.0) / self.step + 0.5
        found = np.bincount(np.minimum(places.astype(np.int64), MOST_PLACES))
        if len(found) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
        self.counts[: len(found)] += found
        self.n += len(values)
        self.total += float(values.sum())

    @property
    def mean(self) -> float | None:
        """None of no values."""
        return self.total / self.n if self.n else None

    def quantile(self, share: float) -> float | None:
        """The value below which this share lies, as fine as the grid; None of no values."""
        if not self.n:
            return None
        place = int(np.searchsorted(np.cumsum(self.counts), share * self.n))
        return float(self._edge(np.array([min(place, len(self.counts) - 1)]))[0])

    def bars(self, most: int = BARS) -> Bars:
        """At most so many bars from the smallest value to the largest."""
        there = np.flatnonzero(self.counts)
        if not len(there):
            nothing = np.zeros(0)
            return Bars(middle=nothing, width=nothing, count=nothing, log=bool(self.per_decade))
        first, last = int(there[0]), int(there[-1]) + 1
        places = -(-(last - first) // most)
        starts = np.arange(first, last, places)
        low, high = self._edge(starts), self._edge(starts + places)
        # A single whole number stands at its own place, several in the middle of those.
        middle, width = (low + high - self.step) / 2, high - low
        if self.per_decade:
            middle, width = np.sqrt(low * high), np.log10(high / low)
        return Bars(
            middle=middle,
            width=width,
            count=np.add.reduceat(self.counts[:last], starts),
            log=bool(self.per_decade),
        )

    def _edge(self, places: np.ndarray) -> np.ndarray:
        if self.per_decade:
            return np.asarray(LOWEST * 10 ** (places / self.per_decade))
        return np.asarray(places * self.step)
