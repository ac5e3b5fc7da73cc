"""What pruning cost a run: its answers beside those of the unpruned run to the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
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
from trio.vqa.figures.row_sums import RowSums, refuse_parted, row_sums
from trio.vqa.intervals import Interval, share_interval
from trio.vqa.relative_score import FEW, Figure, compare, compare_sums

_POINTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedScores:
    """What each row is worth in two runs, of the rows that both answered."""

    unpruned: np.ndarray
    """`[R]`, 0 to 1."""
    pruned: np.ndarray
    pictures: Sequence[object] | np.ndarray
    """The picture's id of each row: a text is the same picture in all benchmarks, anything else
    one of this benchmark."""


def compare_metrics(
    metric: str | None,
    unpruned: Iterable[Answered],
    pruned: Iterable[Answered],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """A pruned setting beside the unpruned one, over the questions that both answered.

    Args:
        metric: one of `aggregates.METRICS`; without one, or without any truth, only how many
            answers are the same text is told, and what scores of the caller's own come to.
        unpruned, pruned: rows of the settings, in any order; pictures are those of the unpruned.
        seed: of the bootstrap.

    Returns:
        An object for JSON; trio/vqa/figures/README.md names its keys.

    Raises:
        UserError: unknown metric, two rows of one key in a setting, a row that cannot be scored, or
            rows that count together but are of several pictures.
    """
    pairs, asked = _both(unpruned, pruned)
    before, after = _scorable(metric, pairs)
    lacking = 0 if metric is None else sum(not has_truth(metric, row) for row, _ in pairs)
    if metric is None or not before:
        return {
            "n": len(pairs),
            "left_out": asked - len(pairs),
            "without_truth": lacking,
            "seed": seed,
            "headline": None,
            "figures": {},
            "agreement": _agreement(pairs),
        }
    x, y = (row_sums(metric, metric_rows(rows)) for rows in (before, after))
    pictures = pictures_of(before, x.first.tolist())
    refuse_parted(x, pictures)
    figures = compare_sums(x, y, pictures, seed=seed)
    return {
        "n": len(before),
        "left_out": asked - lacking - len(before),
        "without_truth": lacking,
        "seed": seed,
        "headline": _of_scores(x, y, pictures, seed)
        or _of_figure(metric_named(metric).headline, figures, len(before), pictures),
        "figures": {name: _plain(figure) for name, figure in figures.items()},
        "agreement": _agreement(pairs),
    }


def paired_scores(
    metric: str, unpruned: Iterable[Answered], pruned: Iterable[Answered]
) -> PairedScores | None:
    """What `average_over` takes of a benchmark; None if its metric gives rows alone no score, or no
    row with a truth was answered in both runs.

    Args:
        metric, unpruned, pruned: as for `compare_metrics`.
    """
    before, after = _scorable(metric, _both(unpruned, pruned)[0])
    if not before:
        return None
    x, y = (row_sums(metric, metric_rows(rows)) for rows in (before, after))
    if x.scores is None or y.scores is None:
        return None
    ids = [row.picture or before[first].key for row, first in zip(before, x.first, strict=True)]
    return PairedScores(unpruned=x.scores, pruned=y.scores, pictures=ids)


def _both(
    unpruned: Iterable[Answered], pruned: Iterable[Answered]
) -> tuple[list[tuple[Answered, Answered]], int]:
    """Rows that both answered, and how many questions there are in either."""
    before, after = by_key(unpruned), by_key(pruned)
    pairs = [
        (row, after[key])
        for key, row in before.items()
        if key in after and row.prediction is not None and after[key].prediction is not None
    ]
    return pairs, len(before.keys() | after.keys())


def _scorable(
    metric: str | None, pairs: Sequence[tuple[Answered, Answered]]
) -> tuple[list[Answered], list[Answered]]:
    """Of both runs, in one order."""
    if metric is None:
        return [], []
    before = complete(metric, [row for row, _ in pairs if has_truth(metric, row)])
    others = {row.key: other for row, other in pairs}
    return before, [others[row.key] for row in before]


def _of_scores(x: RowSums, y: RowSums, pictures: np.ndarray, seed: int) -> dict[str, Any] | None:
    if x.scores is None or y.scores is None:
        return None
    return headline_of(PairedScores(unpruned=x.scores, pruned=y.scores, pictures=pictures), seed)


def headline_of(scores: PairedScores, seed: int = 0) -> dict[str, Any]:
    """The relative score and the difference of rows' scores, as under `headline`."""
    pictures = np.unique(np.asarray(scores.pictures), return_inverse=True)[1]
    found = compare(scores.unpruned, scores.pruned, pictures, seed=seed)
    return {
        "of": "rows",
        "n": found.n,
        "pictures": found.pictures,
        "unpruned": found.unpruned,
        "pruned": found.pruned,
        "relative": found.relative,
        "relative_interval": _listed(found.relative_interval),
        "difference_points": _POINTS * found.difference,
        "difference_points_interval": _listed(found.difference_interval, _POINTS),
        "only_unpruned": found.only_unpruned,
        "only_pruned": found.only_pruned,
        "interval_by": found.interval_by,
        "few_changes": found.changed_pictures < FEW,
        "draws_left_out": found.draws_left_out,
    }


def _of_figure(
    name: str, figures: dict[str, Figure], n: int, pictures: np.ndarray
) -> dict[str, Any]:
    found = figures[name]
    return {
        "of": name,
        "n": n,
        "pictures": len(np.unique(pictures)),
        "unpruned": found.unpruned,
        "pruned": found.pruned,
        "relative": found.pruned / found.unpruned if found.unpruned else None,
        "relative_interval": _listed(found.relative_interval),
        "difference_points": _POINTS * (found.pruned - found.unpruned),
        "difference_points_interval": _listed(found.difference_interval, _POINTS),
        "only_unpruned": None,
        "only_pruned": None,
        "interval_by": "bootstrap, few changes" if found.few_changes else "bootstrap",
        "few_changes": found.few_changes,
        "draws_left_out": found.draws_left_out,
    }


def _plain(figure: Figure) -> dict[str, Any]:
    return asdict(figure) | {
        "difference_interval": _listed(figure.difference_interval),
        "relative_interval": _listed(figure.relative_interval),
    }


def _agreement(pairs: Sequence[tuple[Answered, Answered]]) -> dict[str, Any] | None:
    """How many answers are the same text."""
    if not pairs:
        return None
    same = np.array([row.prediction == other.prediction for row, other in pairs], np.float64)
    pictures = pictures_of([row for row, _ in pairs])
    return {
        "value": float(same.mean()),
        "interval": _listed(share_interval(same, pictures)),
        "interval_by": "wilson",
    }


def _listed(interval: Interval | None, times: int = 1) -> list[float] | None:
    return None if interval is None else [times * bound for bound in interval]
