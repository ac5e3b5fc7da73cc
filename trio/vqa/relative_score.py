"""What pruning cost: two runs over the same rows, with paired intervals over pictures.

Differences between two runs on the same rows are far surer than either run's own figure; so both
are drawn together, and two separate intervals are never compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trio.errors import UserError
from trio.vqa.aggregates import METRICS, Ratio, Row, aggregate
from trio.vqa.intervals import (
    ClusteredBootstrap,
    Interval,
    by_cluster,
    percentiles,
    share_interval,
)

DRAWS = 10_000
FEW = 10
"""Pictures with a changed score; with fewer, a bootstrap's intervals are too short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A mean score of pruned answers beside that of unpruned ones."""

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
        pictures: the picture of each row, `[R]`, numbered from 0.
        seed: of the bootstrap.

    Raises:
        UserError: no rows.
    """
    if not len(unpruned):
        raise UserError("no row was answered in both runs")
    if not len(unpruned) == len(pruned) == len(pictures):
        raise ValueError("a score of each run, and a picture, is needed of each row")
    x, y = (np.asarray(each, np.float64) for each in (unpruned, pruned))
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
        pictures: the picture of each row, `[R]`, numbered from 0; rows that count together (both
            questions of MME, rotations of MMBench) are of one picture.

    Raises:
        UserError: as `aggregate`.
    """
    bootstrap = ClusteredBootstrap(pictures, seed=seed, resamples=DRAWS)
    found = [aggregate(metric, rows) for rows in (unpruned, pruned)]
    x, y = (_figures(metric, rows, bootstrap) for rows in (unpruned, pruned))
    return {
        name: Figure(
            unpruned=found[0][name],
            pruned=found[1][name],
            difference_interval=percentiles(y[name] - x[name]),
            relative_interval=percentiles(y[name][x[name] > 0] / x[name][x[name] > 0])
            if (x[name] > 0).any()
            else None,
        )
        for name in x
        if name in y
    }


def _figures(
    metric: str, rows: Sequence[Row], bootstrap: ClusteredBootstrap
) -> dict[str, np.ndarray]:
    """Each figure in every draw, `[draws]`."""
    columns: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros(len(rows)))
    for item in METRICS[metric].items(rows):
        for name, ratio in item.adds.items():
            for side, value in enumerate(ratio):
                columns[name, side][item.rows[0]] = value
    sums = dict(zip(columns, bootstrap.sums(*columns.values()), strict=True))
    ratios = {name: Ratio(sums[name, 0], sums[name, 1]) for name, side in columns if side == 0}
    return {
        name: np.broadcast_to(value, (DRAWS,))
        for name, value in METRICS[metric].figures(ratios).items()
    }


def _drawn(
    x: np.ndarray, y: np.ndarray, pictures: np.ndarray, seed: int
) -> tuple[Interval, Interval | None, int]:
    bootstrap = ClusteredBootstrap(pictures, seed=seed, resamples=DRAWS)
    before, after, rows = bootstrap.sums(x, y, np.ones(len(x)))
    difference = percentiles((after - before) / rows)
    if not x.any():
        return difference, None, 0
    scored = before > 0
    return difference, percentiles(after[scored] / before[scored]), int((~scored).sum())


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
    low, high = (1 + bound / float(x.mean()) for bound in difference)
    return difference, (low, high)
