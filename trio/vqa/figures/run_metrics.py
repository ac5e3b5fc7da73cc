"""The figures of one setting of a run (one model, one pruning), with what did not get an answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trio.vqa.aggregates import metric_named
from trio.vqa.figures.answered import (
    Answered,
    by_key,
    complete,
    has_truth,
    metric_rows,
    pictures_of,
)
from trio.vqa.figures.figure_intervals import figures_with_intervals
from trio.vqa.figures.row_sums import RowSums, refuse_parted, row_sums

_INCOMPLETE = {"mme": "pair incomplete", "mmbench": "base row missing"}
_OF_ANSWERS = "unparsed"


def run_metrics(
    metric: str | None, rows: Iterable[Answered], *, seed: int = 0, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of a setting, over the rows that have an answer and a truth.

    Beside them `figures_failed_as_wrong`: the same with rows that failed as wrong answers. Of POPE
    that is the opposite of the truth, as it takes an empty answer for yes; of captions an empty
    one; of objects a caption without any, which lowers recall and adds nothing wrong, so that it
    leaves `chair_i` as it is and thins `chair_s`. `unparsed` is of answers, and not in it.

    A question of MME whose picture's other one has no answer, and rotations of a question of
    MMBench that itself has none, count as failed. A rotation that failed leaves its question to the
    others.

    Args:
        metric: one of `aggregates.METRICS`; None counts only.
        rows: of the setting, in any order.
        seed: of the bootstrap.
        about: what the figures depend on, passed through: prompt template, rule, tokeniser.

    Returns:
        An object for JSON; trio/vqa/figures/README.md names its keys.

    Raises:
        UserError: unknown metric, two rows of one key, a row that cannot be scored, or rows that
            count together but are of several pictures.
    """
    every = list(by_key(rows).values())
    answered = [row for row in every if row.prediction is not None]
    kinds = Counter(row.error or "unknown" for row in every if row.prediction is None)
    result: dict[str, Any] = {
        "metric": metric,
        "headline": None if metric is None else metric_named(metric).headline,
        "about": dict(about),
        "seed": seed,
        "rows": len(every),
    }
    if metric is None:
        return (
            result
            | _counts(answered, kinds, 0, pictures_of(answered))
            | {
                "figures": {},
                "figures_failed_as_wrong": None,
                "groups": {
                    column: {value: {"n": len(places)} for value, places in values.items()}
                    for column, values in _groups(answered, range(len(answered))).items()
                },
            }
        )
    true = [row for row in answered if has_truth(metric, row)]
    scored = complete(metric, true)
    if len(scored) < len(true):
        kinds[_INCOMPLETE[metric]] += len(true) - len(scored)
    without_truth = len(answered) - len(true)
    figures, groups, pictures = _figures(metric, scored, seed)
    return (
        result
        | _counts(scored, kinds, without_truth, pictures)
        | {
            "figures": figures,
            "figures_failed_as_wrong": _failed_as_wrong(metric, every, len(scored)),
            "groups": groups,
        }
    )


def _counts(
    scored: Sequence[Answered], kinds: Counter[str], without_truth: int, pictures: np.ndarray
) -> dict[str, Any]:
    return {
        "answered": len(scored) + without_truth,
        "failed": kinds.total(),
        "error_kinds": dict(sorted(kinds.items())),
        "without_truth": without_truth,
        "pictures": len(np.unique(pictures)),
    }


def _figures(
    metric: str, rows: Sequence[Answered], seed: int
) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Of all and of each group, and the pictures of the rows."""
    if not rows:
        return {}, {}, np.zeros(0, np.int64)
    sums = row_sums(metric, metric_rows(rows))
    pictures = pictures_of(rows, sums.first.tolist())
    refuse_parted(sums, pictures)
    groups = {
        column: {
            value: _of_group(sums, rows, pictures, places, seed) for value, places in values.items()
        }
        for column, values in _groups(rows, sums.first.tolist()).items()
    }
    return figures_with_intervals(sums, pictures, seed=seed), groups, pictures


def _groups(rows: Sequence[Answered], first: Iterable[int]) -> dict[str, dict[str, list[int]]]:
    """Places of the rows of each value of each column; rows that count together are where the
    first of them is."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, leader in enumerate(first):
        for column, value in rows[leader].groups.items():
            groups[column][value].append(place)
    return groups


def _of_group(
    sums: RowSums,
    rows: Sequence[Answered],
    pictures: np.ndarray,
    places: list[int],
    seed: int,
) -> dict[str, Any]:
    if metric_named(sums.metric).of_all:
        part = row_sums(sums.metric, metric_rows(rows[place] for place in places))
    else:
        part = sums.part(np.array(places))
    inside = np.unique(pictures[places], return_inverse=True)[1]
    return {
        "n": len(places),
        "pictures": int(inside.max()) + 1,
        "figures": figures_with_intervals(part, inside, seed=seed),
    }


def _failed_as_wrong(
    metric: str, every: Sequence[Answered], scored: int
) -> dict[str, float] | None:
    """None if no row failed that has a truth."""
    rows = complete(metric, [row for row in every if has_truth(metric, row)])
    if len(rows) == scored:
        return None
    values = row_sums(metric, metric_rows(rows)).values
    return {name: value for name, value in values.items() if name != _OF_ANSWERS}
