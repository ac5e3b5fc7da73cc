"""Searches the schedule of least divergence among those that cost no more.

Candidates keep the same layer average as the default schedule. A coarse grid says where the first
stage comes, how many there are, where the others lie and how steeply they fall; then two rounds
change the best so far in one place at a time. Both by successive halving (Jamieson and Talwalkar,
arXiv 1502.07943): all on one half of the rows, the better ones on the other half, too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from trio.errors import UserError
from trio.pruning.schedule import Schedule

COARSE, FINE = 20, 10
"""Most candidates of the grid, and of each round that changes the best."""
STEEPNESS = (0.6, 0.3)
"""What a stage of the grid keeps of the stage before it."""
PLACES = ((), (1 / 3,), (2 / 3,), (1 / 4, 1 / 2), (1 / 3, 2 / 3))
"""Of the grid's further stages, as shares of the layers behind the first one."""
CHANGES = ((1 / 8, 1.6), (1 / 16, 1.25))
"""Of each round: layers of the decoder by which a stage moves, as a share, and the factor by which
what it keeps, of the stage before it, changes."""
Divergence = Callable[[Schedule, range], Sequence[float]]
"""Of a schedule, for rows that are named by their numbers."""
Shares = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Where to search."""

    default: Schedule
    """The schedule to beat; ratios."""
    retention: float
    """Layer average of all candidates."""
    num_layers: int
    """Of the decoder."""
    allowed: Callable[[Schedule], bool]
    """Whether a candidate is one for the model and costs no more than the default."""
    first: int | None = None
    """Where the first stage may lie; None: anywhere."""

    def grid(self) -> list[Schedule]:
        """The coarse candidates, without the default."""
        return self._usable(
            [(first, 1.0), *zip(places, _falling(steepness, len(places)), strict=True)]
            for first in self._firsts()
            for further in PLACES
            for places in [self._places(first, further)]
            for steepness in STEEPNESS
        )

    def around(self, schedule: Schedule, change: tuple[float, float]) -> list[Schedule]:
        """The schedule with a single stage moved, weighed anew or left out."""
        return self._usable(_changed(_shares(schedule), self.num_layers, *change))

    def _firsts(self) -> list[int]:
        if self.first is not None:
            return [self.first]
        most = self.retention * self.num_layers
        # What stands before the first stage may take up some three quarters of the budget.
        found = {0, 1, *(round(most * share) for share in (0.25, 0.5, 0.75))}
        return sorted(first for first in found if first < most)

    def _places(self, first: int, further: Sequence[float]) -> list[int]:
        left = self.num_layers - first
        return [first + max(1, round(share * left)) for share in further]

    def _usable(self, candidates: Iterator[Shares]) -> list[Schedule]:
        found: dict[Schedule, None] = {}
        for shares in candidates:
            schedule = self._schedule(shares)
            if schedule is not None and schedule != self.default and self.allowed(schedule):
                found[schedule] = None
        return list(found)

    def _schedule(self, shares: Shares) -> Schedule | None:
        layers = [layer for layer, _ in shares]
        if self.first is not None and layers[0] != self.first:
            return None
        rising = all(before < after for before, after in pairwise(layers))
        if not rising or layers[0] < 0 or layers[-1] >= self.num_layers:
            return None
        try:
            return Schedule.of_shares(self.retention, self.num_layers, shares)
        except UserError:
            return None


def _falling(steepness: float, count: int) -> list[float]:
    return [steepness**number for number in range(1, count + 1)]


def _shares(schedule: Schedule) -> Shares:
    return [(stage.layer, float(stage.keep)) for stage in schedule.stages]


def _changed(shares: Shares, num_layers: int, step: float, factor: float) -> Iterator[Shares]:
    by = max(1, round(step * num_layers))
    for number, (layer, _) in enumerate(shares):
        for moved in (layer - by, layer + by):
            yield [(moved if i == number else at, share) for i, (at, share) in enumerate(shares)]
        if number:
            for scale in (1 / factor, factor):
                yield [
                    (at, share * scale if i >= number else share)
                    for i, (at, share) in enumerate(shares)
                ]
            yield [stage for i, stage in enumerate(shares) if i != number]


@dataclass(slots=True)
class Search:
    """A search under way."""

    space: Space
    rows: int
    """To search on, at least 4."""
    divergence: Divergence
    """Measures."""
    seed: int = 0
    scores: dict[Schedule, list[float]] = field(default_factory=dict)
    """For each schedule its divergences on the first rows."""

    def best(self) -> Schedule:
        """The schedule with the least mean divergence on all rows; it may be the default."""
        chance = random.Random(self.seed)
        best = self._compete([], self.space.default)
        best = self._compete(_some(self.space.grid(), COARSE, chance), best)
        for change in CHANGES:
            fresh = [one for one in self.space.around(best, change) if one not in self.scores]
            best = self._compete(_some(fresh, FINE, chance), best)
        return best

    def _compete(self, candidates: list[Schedule], best: Schedule) -> Schedule:
        """The best of the candidates and the best so far."""
        left = candidates
        for stop in rungs(self.rows):
            for schedule in left:
                self._measure(schedule, stop)
            left = sorted(left, key=self.mean)[: math.ceil(len(left) / 2)]
        self._measure(best, self.rows)
        return min([best, *left], key=self.mean)

    def _measure(self, schedule: Schedule, stop: int) -> None:
        done = self.scores.setdefault(schedule, [])
        if len(done) < stop:
            done += self.divergence(schedule, range(len(done), stop))

    def mean(self, schedule: Schedule) -> float:
        """Of a schedule's divergences so far."""
        return fmean(self.scores[schedule])


def rungs(rows: int) -> list[int]:
    """Rows after which candidates are compared.

    Not fewer: a poor schedule does well on most rows and badly on a few.
    """
    return [math.ceil(rows / 2), rows]


def most_answers(rows: int) -> int:
    """Answers of pruned models that a search takes at most, the default's among them."""
    total, before = rows, 0
    for number, stop in enumerate(rungs(rows)):
        for count in (COARSE, *(FINE for _ in CHANGES)):
            total += math.ceil(count / 2**number) * (stop - before)
        before = stop
    return total


def _some(candidates: list[Schedule], most: int, chance: random.Random) -> list[Schedule]:
    return candidates if len(candidates) <= most else chance.sample(candidates, most)
