"""What each row adds to the ratios of a metric, in columns: every row is scored once, and figures
of all rows, of some, and of a bootstrap's draws are made of the same sums."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trio.errors import UserError
from trio.vqa.aggregates import Ratio, Row, checked, metric_named

Key = tuple[str, int]
"""A ratio, and which side of it: 0 above, 1 below."""


class Column(NamedTuple):
    """What rows add to one ratio."""

    rows: np.ndarray
    """Places of the rows, `[K]`; of rows that count together, the first adds all."""
    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSums:
    """Rows of a data set, scored."""

    metric: str
    columns: dict[str, Column]
    """By ratio."""
    first: np.ndarray
    """The first of the rows that each row counts together with, `[R]`."""
    scores: np.ndarray | None
    """Of each row alone, `[R]`; None if the metric has none."""

    @property
    def values(self) -> dict[str, float]:
        """The figures."""
        sums = {key: side.sum() for key, _, side in self._sides()}
        return {name: float(value) for name, value in self.figures(sums).items()}

    def figures(self, sums: dict[Key, Any]) -> dict[str, Any]:
        """Of sums of the columns; of arrays of sums, one for each draw, arrays."""
        ratios = {name: Ratio(sums[name, 0], sums[name, 1]) for name in self.columns}
        return metric_named(self.metric).figures(ratios)

    def by_picture(self, pictures: np.ndarray) -> dict[Key, np.ndarray]:
        """Sums of the rows of each picture, `[P]`.

        Args:
            pictures: of each row, `[R]`, numbered from 0.
        """
        count = int(pictures.max()) + 1
        return {
            key: np.bincount(pictures[rows], weights=side, minlength=count)
            for key, rows, side in self._sides()
        }

    def dense(self, name: str) -> np.ndarray:
        """Both sides of what each row adds to a ratio, `[2, R]`."""
        sides = np.zeros((2, len(self.first)))
        if (column := self.columns.get(name)) is not None:
            sides[:, column.rows] = column.above, column.below
        return sides

    def part(self, rows: np.ndarray) -> RowSums:
        """Of some rows, in their order; those that count together must be all in or out.

        Args:
            rows: their places, `[S]`.
        """
        place = np.full(len(self.first), -1)
        place[rows] = np.arange(len(rows))
        columns = {}
        for name, column in self.columns.items():
            new = place[column.rows]
            inside = new >= 0
            if inside.any():
                columns[name] = Column(new[inside], column.above[inside], column.below[inside])
        return RowSums(
            metric=self.metric,
            columns=columns,
            first=place[self.first[rows]],
            scores=None if self.scores is None else self.scores[rows],
        )

    def _sides(self) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        for name, column in self.columns.items():
            yield (name, 0), column.rows, column.above
            yield (name, 1), column.rows, column.below


def row_sums(metric: str, rows: Sequence[Row]) -> RowSums:
    """Rows, scored.

    Args:
        metric: one of `aggregates.METRICS`.
        rows: as for `aggregates.aggregate`; one whose `prediction` is None counts as wrong.

    Raises:
        UserError: as `aggregates.aggregate`.
    """
    checked(metric, [_with_answer(row) for row in rows])
    columns: dict[str, tuple[array[int], array[float], array[float]]] = defaultdict(
        lambda: (array("q"), array("d"), array("d"))
    )
    first = np.zeros(len(rows), np.int64)
    scores = np.zeros(len(rows))
    for item in metric_named(metric).items(rows):
        of_item = list(item.rows)
        first[of_item] = of_item[0]
        if item.scores:
            scores[of_item] = item.scores
        for name, (above, below) in item.adds.items():
            rows_of, aboves, belows = columns[name]
            rows_of.append(of_item[0])
            aboves.append(above)
            belows.append(below)
    return RowSums(
        metric=metric,
        columns={
            name: Column(*(np.array(values) for values in column))
            for name, column in columns.items()
        },
        first=first,
        scores=None if metric_named(metric).score is None else scores,
    )


def refuse_parted(sums: RowSums, pictures: np.ndarray) -> None:
    """Rows that count together have to be of one picture.

    Args:
        pictures: of each row, `[R]`, as any ids.

    Raises:
        UserError: they are of several; names them.
    """
    parted = pictures[sums.first] != pictures
    if parted.any():
        rows = np.flatnonzero(sums.first == sums.first[int(parted.argmax())]).tolist()
        raise UserError(f"rows {rows} count together, but are of several pictures")


def _with_answer(row: Row) -> Row:
    """A row that failed lacks only its answer."""
    if row.get("prediction", "") is not None:
        return row
    return {**row, "prediction": "", "mentioned": []}
