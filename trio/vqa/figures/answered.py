"""Answers of a run as the metrics take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trio.errors import UserError
from trio.vqa.aggregates import Row, metric_named

_LIST_OF_TRUTHS = ("answers", "references", "choices")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One question of one setting."""

    key: tuple[int, int]
    """Its row, and the number of its prompt."""
    picture: str
    """The picture's id; "" if it is not known, then the question has one of its own."""
    prediction: str | None
    """None: the row failed or was refused."""
    error: str | None = None
    """Its kind, of a row that failed."""
    fields: Mapping[str, Any]
    """That the metric needs, but for the prediction; what the data set does not give may lack."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Values of the columns to group by."""


def by_key(rows: Iterable[Answered]) -> dict[tuple[int, int], Answered]:
    """Rows by their key.

    Raises:
        UserError: two of one key; names it.
    """
    found: dict[tuple[int, int], Answered] = {}
    for row in rows:
        if row.key in found:
            raise UserError(f"row {row.key[0]}, prompt {row.key[1]} stands twice in the answers")
        found[row.key] = row
    return found


def has_truth(metric: str, row: Answered) -> bool:
    """Whether all is there that the metric compares an answer with."""
    return all(
        row.fields.get(name) is not None
        and not (name in _LIST_OF_TRUTHS and not len(row.fields[name]))
        for name in metric_named(metric).truth
    )


def metric_rows(rows: Iterable[Answered]) -> list[Row]:
    """As `aggregates` takes them; the prediction of those that failed is None."""
    return [{**row.fields, "prediction": row.prediction} for row in rows]


def complete(metric: str, rows: Sequence[Answered]) -> list[Answered]:
    """Rows but for those that cannot count, as others that count with them are missing."""
    missing = set(metric_named(metric).incomplete(metric_rows(rows)))
    return [row for number, row in enumerate(rows) if number not in missing]


def pictures_of(rows: Sequence[Answered], first: Iterable[int] | None = None) -> np.ndarray:
    """The picture of each row, `[R]`, numbered from 0 without holes.

    Args:
        first: of each row, the first of those that it counts together with: where their picture is
            not known, it is one.
    """
    numbers: dict[str | tuple[int, int], int] = {}
    firsts = range(len(rows)) if first is None else first
    return np.array(
        [
            numbers.setdefault(row.picture or rows[leader].key, len(numbers))
            for row, leader in zip(rows, firsts, strict=True)
        ],
        np.int64,
    )
