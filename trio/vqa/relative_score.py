"""What pruning cost: two runs over the same rows, with paired intervals over pictures.

Differences between two runs on the same rows are far surer than either run's own figure; so both
are drawn together, and two separate intervals are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trio.errors import UserError
from trio.vqa.aggregates import Row
from trio.vqa.figures.row_sums import Key, RowSums, refuse_parted, row_sums
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
LOTS, LOT = 5_000, 10
"""Of pictures, where there are so many that a lot has at least `LOT`."""
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
    return compare_sums(row_sums(metric, unpruned), row_sums(metric, pruned), pictures, seed=seed)


def compare_sums(
    unpruned: RowSums, pruned: RowSums, pictures: np.ndarray, *, seed: int = 0
) -> dict[str, Figure]:
    """`compare_figures` of rows that are scored already.

    Raises:
        UserError: no rows; other numbers of rows; rows that count together of two pictures.
    """
    pictures = _pictures(pictures, len(unpruned.first), len(pruned.first))
    for sums in (unpruned, pruned):
        refuse_parted(sums, pictures)
    before, after = unpruned.values, pruned.values
    few = _changed(unpruned, pruned, pictures) < FEW
    x, y = (
        {
            name: np.broadcast_to(value, (DRAWS,))
            for name, value in sums.figures(drawn_sums(sums, pictures, seed=seed)).items()
        }
        for sums in (unpruned, pruned)
    )
    return {
        name: Figure(
            unpruned=before[name],
            pruned=after[name],
            difference_interval=percentiles(y[name] - x[name]),
            relative_interval=of_quotients(y[name], x[name]),
            draws_left_out=int((x[name] <= 0).sum()),
            few_changes=few,
        )
        for name in filter(y.__contains__, x)
    }


def drawn_sums(sums: RowSums, pictures: np.ndarray, *, seed: int) -> dict[Key, np.ndarray]:
    """The sum of each column in every draw, `[draws]`; of one seed, draws are the same pictures.

    Args:
        pictures: of each row, `[R]`, numbered from 0 without holes.
    """
    added = sums.by_picture(pictures)
    return dict(zip(added, drawn(*added.values(), seed=seed), strict=True))


def drawn(*values: np.ndarray, seed: int) -> np.ndarray:
    """Sums over each draw's pictures, `[V, draws]`.

    Very many pictures are drawn in `LOTS` random lots of about the same size (random groups, Wolter
    2007, chapter 2): intervals are as long but for one per cent, and take time in proportion to the
    pictures.

    Args:
        values: a number for each picture, `[P]` each.
    """
    count = len(values[0])
    if count >= LOT * LOTS:
        lots = np.random.default_rng(seed).permutation(count) % LOTS
        values = tuple(by_cluster(each, lots) for each in values)
    bootstrap = ClusteredBootstrap(np.arange(len(values[0])), seed=seed, resamples=DRAWS)
    return bootstrap.sums(*values)


def _pictures(pictures: np.ndarray, *counts: int) -> np.ndarray:
    """Numbered from 0, one for each row."""
    if not len(pictures):
        raise UserError("no row was answered in both runs")
    if any(count != len(pictures) for count in counts):
        raise UserError(f"{len(pictures)} pictures, but rows: {' and '.join(map(str, counts))}")
    return numbered(pictures)


def _changed(x: RowSums, y: RowSums, pictures: np.ndarray) -> int:
    """Pictures of which something differs."""
    changed = np.zeros(len(pictures), bool)
    for name in x.columns.keys() | y.columns.keys():
        changed |= (x.dense(name) != y.dense(name)).any(axis=0)
    return len(np.unique(pictures[changed]))


def _drawn(
    x: np.ndarray, y: np.ndarray, pictures: np.ndarray, seed: int
) -> tuple[Interval, Interval | None, int]:
    sides = (by_cluster(each, pictures) for each in (x, y, np.ones(len(x))))
    before, after, rows = drawn(*sides, seed=seed)
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
