"""Figures of one run, each with a 95 % interval."""

from __future__ import annotations

from typing import Any

import numpy as np

from trio.vqa.aggregates import Ratio, metric_named
from trio.vqa.figures.row_sums import Column, RowSums
from trio.vqa.intervals import Interval, of_quotients, percentiles, share_interval
from trio.vqa.relative_score import drawn_sums


def figures_with_intervals(
    sums: RowSums, pictures: np.ndarray, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Each figure as `value`, `interval` and `interval_by`.

    Shares of rows get Wilson's interval, with as many rows as their pictures are worth; all others
    a bootstrap over pictures. There is no interval of a share over nothing, nor by a bootstrap of
    a single picture.

    Args:
        pictures: of each row, `[R]`, numbered from 0 without holes.
        seed: of the bootstrap.
    """
    sizes = np.bincount(sums.first, minlength=len(sums.first))
    quotients = _quotients(sums)
    shares = {name for name in quotients if _is_share(sums.columns[name], sizes)}
    others = [name for name in sums.values if name not in shares]
    drawn = _drawn(sums, pictures, others, quotients, seed)
    return {
        name: _figure(value, _wilson(sums.columns[name], pictures), "wilson")
        if name in shares
        else _figure(value, drawn[name], "bootstrap")
        for name, value in sums.values.items()
    }


def _figure(value: float, interval: Interval | None, by: str) -> dict[str, Any]:
    return {
        "value": value,
        "interval": None if interval is None else list(interval),
        "interval_by": None if interval is None else by,
    }


def _quotients(sums: RowSums) -> set[str]:
    """Figures that are the quotient of the ratio of their name: a metric may make another thing of
    it, which quotients of no data tell."""
    figures = metric_named(sums.metric).figures({name: Ratio(1.0, 4.0) for name in sums.columns})
    return {name for name, value in figures.items() if name in sums.columns and value == 0.25}


def _is_share(column: Column, sizes: np.ndarray) -> bool:
    """Whether each row is in it or not, and if it is, right or wrong."""
    _, above, below = column
    whole = (above == np.floor(above)) & (below == np.floor(below))
    return bool((whole & (above >= 0) & (above <= below) & (below <= sizes[column.rows])).all())


def _wilson(column: Column, pictures: np.ndarray) -> Interval | None:
    rows = column.below.astype(np.int64)
    if not rows.any():
        return None
    place = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    hits = (place < np.repeat(column.above, rows)).astype(np.float64)
    return share_interval(hits, np.repeat(pictures[column.rows], rows))


def _drawn(
    sums: RowSums, pictures: np.ndarray, names: list[str], quotients: set[str], seed: int
) -> dict[str, Interval | None]:
    """A draw without any row of a quotient says nothing of it."""
    if not names or not pictures.any():
        return dict.fromkeys(names)
    drawn = drawn_sums(sums, pictures, seed=seed)
    figures = sums.figures(drawn)
    intervals: dict[str, Interval | None] = {}
    for name in names:
        if name not in quotients:
            intervals[name] = percentiles(figures[name])
        elif len(np.unique(pictures[_rows(sums.columns[name])])) > 1:
            intervals[name] = of_quotients(drawn[name, 0], drawn[name, 1])
        else:
            intervals[name] = None
    return intervals


def _rows(column: Column) -> np.ndarray:
    return column.rows[column.below > 0]
