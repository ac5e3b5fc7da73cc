"""What pruning cost: two runs over the same rows, with paired intervals over pictures.

Differences between two runs on the same rows are far surer than either run's own figure; so both
are drawn together, and two separate intervals are never compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trio.errors import UserError
from trio.vqa.aggregates import Ratio, Row, checked, metric_named
from trio.vqa.intervals import (
    ClusteredBootstrap,
    Interval,
    by_cluster,
    numbered,
    of_quotients,
    percentiles,
    share_interval,
)

DRAWS = 10_000
FEW = 10
"""Pictures with a changed score; with fewer, a bootstrap's intervals are too short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A mean score of pruned answers beside that of unpruned ones; all figures as fractions."""

    n: int
    """Rows that both runs answered."""
    pictures: int
    changed_pictures: int
    """With a row whose score differs."""
    unpruned: float
    pruned: float
    difference: float
    """Pruned less unpruned."""
    difference_interval: Interval
    """95 %."""
    relative: float | None
    """Pruned over unpruned; None if no unpruned answer scores."""
    relative_interval: Interval | None
    only_unpruned: int | None
    """Rows that only the unpruned run has right; None where scores are not 0 or 1."""
    only_pruned: int | None
    interval_by: str
    """`bootstrap`; `wilson`, of the rows that changed, where few did; `bootstrap, few changes`
    where few changed and scores are not 0 or 1: too short then."""
    draws_left_out: int
    """Of the relative score, because no unpruned answer in them scores."""


def compare(
    unpruned: np.ndarray, pruned: np.ndarray, pictures: np.ndarray, *, seed: int = 0
) -> Comparison:
    """The relative score of a pruned run, and its difference.

    Args:
        unpruned, pruned: the score of each row, `[R]`, in the same order.
        pictures: the picture of each row, `[R]`, as any ids.
        seed: of the bootstrap.

    Raises:
        UserError: no rows, scores that are not finite, or more of one than of the others.
    """
    x, y = (np.asarray(each, np.float64) for each in (unpruned, pruned))
    pictures = _pictures(pictures, len(x), len(y))
    if not np.isfinite([x, y]).all():
        raise UserError("a score is not finite")
    binary = bool(np.isin([x, y], (0, 1)).all())
    changed = int((by_cluster(np.abs(y - x), pictures) > 0).sum())
    left_out = 0
    if changed < FEW and binary:
        difference, relative = _of_few(x, y, pictures)
        interval_by = "wilson"
    else:
        difference, relative, left_out = _drawn(x, y, pictures, seed)
        interval_by = "bootstrap" if changed >= FEW else "bootstrap, few changes"
    return Comparison(
        n=len(x),
        pictures=int(pictures.max()) + 1,
        changed_pictures=changed,
        unpruned=float(x.mean()),
        pruned=float(y.mean()),
        difference=float(y.mean() - x.mean()),
        difference_interval=difference,
        relative=float(y.sum() / x.sum()) if x.any() else None,
        relative_interval=relative,
        only_unpruned=int((x > y).sum()) if binary else None,
        only_pruned=int((y > x).sum()) if binary else None,
        interval_by=interval_by,
        draws_left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A published figure of pruned answers beside that of unpruned ones."""

    unpruned: float
    pruned: float
    difference_interval: Interval
    """95 %, of pruned less unpruned."""
    relative_interval: Interval | None
    """95 %, of pruned over unpruned; None if that is undefined in all draws."""
    draws_left_out: int
    """Of the relative figure, because the unpruned one is 0 in them."""
    few_changes: bool
    """Whether so few pictures changed (`FEW`) that the intervals are too short."""


def compare_figures(
    metric: str,
    unpruned: Sequence[Row],
    pruned: Sequence[Row],
    pictures: np.ndarray,
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """All figures of a data set, those that are no means of rows too: each is computed anew in
    every draw. Of CIDEr, document frequencies are those of the whole set.

    Args:
        metric, unpruned, pruned: as for `aggregate`; the same rows in the same order.
        pictures: the picture of each row, `[R]`, as any ids; rows that count together (both
            questions of MME, rotations of MMBench) must be of one.

    Raises:
        UserError: as `aggregate`; other numbers of rows; rows that count together of two pictures.
    """
    pictures = _pictures(pictures, len(unpruned), len(pruned))
    bootstrap = ClusteredBootstrap(pictures, seed=seed, resamples=DRAWS)
    added = [_added(metric, checked(metric, rows), pictures) for rows in (unpruned, pruned)]
    few = _changed(added[0], added[1], pictures) < FEW
    before, after = (_figures(metric, one, [v.sum() for v in one.values()]) for one in added)
    x, y = (
        {
            name: np.broadcast_to(value, (DRAWS,))
            for name, value in _figures(metric, one, bootstrap.sums(*one.values())).items()
        }
        for one in added
    )
    return {
        name: Figure(
            unpruned=float(before[name]),
            pruned=float(after[name]),
            difference_interval=percentiles(y[name] - x[name]),
            relative_interval=of_quotients(y[name], x[name]),
            draws_left_out=int((x[name] <= 0).sum()),
            few_changes=few,
        )
        for name in filter(y.__contains__, x)
    }


_Added = dict[tuple[str, int], np.ndarray]
"""Both sides of each ratio, 0 and 1: what each row adds, `[R]`; of rows that count together, the
first adds it."""


def _pictures(pictures: np.ndarray, *counts: int) -> np.ndarray:
    """Numbered from 0, one for each row."""
    if not len(pictures):
        raise UserError("no row was answered in both runs")
    if any(count != len(pictures) for count in counts):
        raise UserError(f"{len(pictures)} pictures, but rows: {' and '.join(map(str, counts))}")
    return numbered(pictures)


def _added(metric: str, rows: Sequence[Row], pictures: np.ndarray) -> _Added:
    columns: _Added = defaultdict(lambda: np.zeros(len(rows)))
    for item in metric_named(metric).items(rows):
        if len(set(pictures[list(item.rows)])) > 1:
            raise UserError(f"rows {list(item.rows)} count together, but are of several pictures")
        for name, ratio in item.adds.items():
            for side, value in enumerate(ratio):
                columns[name, side][item.rows[0]] = value
    return columns


def _changed(x: _Added, y: _Added, pictures: np.ndarray) -> int:
    """Pictures of which something differs."""
    rows = np.zeros(len(pictures), bool)
    for key in x.keys() | y.keys():
        rows |= x[key] != y[key] if key in x and key in y else True
    return len(set(pictures[rows]))


def _figures(metric: str, added: _Added, sums: Iterable[Any]) -> dict[str, Any]:
    """Of the sum of each column of `added`; of arrays of sums, one for each draw, arrays."""
    found = dict(zip(added, sums, strict=True))
    ratios = {name: Ratio(found[name, 0], found[name, 1]) for name, side in added if side == 0}
    return metric_named(metric).figures(ratios)


def _drawn(
    x: np.ndarray, y: np.ndarray, pictures: np.ndarray, seed: int
) -> tuple[Interval, Interval | None, int]:
    bootstrap = ClusteredBootstrap(pictures, seed=seed, resamples=DRAWS)
    before, after, rows = bootstrap.sums(x, y, np.ones(len(x)))
    difference = percentiles((after - before) / rows)
    left_out = int((before <= 0).sum()) if x.any() else 0
    return difference, of_quotients(after, before), left_out


def _of_few(x: np.ndarray, y: np.ndarray, pictures: np.ndarray) -> tuple[Interval, Interval | None]:
    """From the shares of rows that are right in one run alone: never too short, and what rows
    without any change allow to say."""
    lost, won = (
        share_interval(only.astype(np.float64), pictures, confidence=0.975)
        for only in (x > y, y > x)
    )
    difference = won[0] - lost[1], won[1] - lost[0]
    if not x.any():
        return difference, None
    low, high = (max(0.0, 1 + bound / float(x.mean())) for bound in difference)
    return difference, (low, high)
