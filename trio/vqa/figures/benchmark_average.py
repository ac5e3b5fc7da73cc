"""The mean relative score over benchmarks, as papers on pruning quote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trio.errors import UserError
from trio.vqa.figures.run_comparison import PairedScores
from trio.vqa.intervals import by_cluster, numbered, percentiles
from trio.vqa.relative_score import DRAWS, FEW, drawn


def average_over(benchmarks: Mapping[str, PairedScores], *, seed: int = 0) -> dict[str, Any]:
    """The mean of the relative scores, with a 95 % interval of a joint bootstrap over pictures.

    Benchmarks that share pictures are drawn together, all others on their own.

    Args:
        benchmarks: by name, as `run_comparison.paired_scores` gives them.
        seed: of the bootstrap.

    Returns:
        An object for JSON; trio/vqa/figures/README.md names its keys. No `relative` if one of the
        benchmarks has none, as no unpruned answer scores: `undefined` names them.

    Raises:
        UserError: no benchmarks, or one without rows.
    """
    if not benchmarks:
        raise UserError("there are no benchmarks to average over")
    for name, scores in benchmarks.items():
        if not len(scores.unpruned):
            raise UserError(f"benchmark {name!r}: no row was answered in both runs")
    each = {
        name: float(scores.pruned.sum() / scores.unpruned.sum()) if scores.unpruned.any() else None
        for name, scores in benchmarks.items()
    }
    undefined = [name for name, relative in each.items() if relative is None]
    numbers = _numbers(benchmarks)
    together = _sharing(numbers)
    result = {
        "seed": seed,
        "benchmarks": each,
        "undefined": undefined,
        "drawn_together": [sorted(names) for names in together if len(names) > 1],
        "few_changes": [name for name, scores in benchmarks.items() if _few(scores, numbers[name])],
        "relative": None,
        "relative_interval": None,
        "draws_left_out": 0,
    }
    if undefined:
        return result
    means = np.concatenate(
        [
            _draws([(benchmarks[name], numbers[name]) for name in names], one)
            for names, one in zip(together, _seeds(seed, len(together)), strict=True)
        ]
    ).mean(axis=0)
    defined = means[np.isfinite(means)]
    return result | {
        "relative": sum(value for value in each.values() if value is not None) / len(each),
        "relative_interval": list(percentiles(defined)) if len(defined) else None,
        "draws_left_out": DRAWS - len(defined),
    }


def _numbers(benchmarks: Mapping[str, PairedScores]) -> dict[str, np.ndarray]:
    """The picture of each row, numbered over all benchmarks."""
    known: dict[object, int] = {}
    return {
        name: np.array(
            [
                known.setdefault(id_ if isinstance(id_, str) else (name, id_), len(known))
                for id_ in scores.pictures
            ]
        )
        for name, scores in benchmarks.items()
    }


def _sharing(pictures: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Benchmarks in groups that have pictures in common, over others too."""
    groups: list[tuple[list[str], set[int]]] = []
    for name, numbers in pictures.items():
        names, seen = [name], set(numbers.tolist())
        apart = []
        for group in groups:
            if group[1].isdisjoint(seen):
                apart.append(group)
            else:
                names, seen = group[0] + names, seen | group[1]
        groups = [*apart, (names, seen)]
    return [names for names, _ in groups]


def _seeds(seed: int, count: int) -> list[int]:
    """Others for each, or benchmarks with as many pictures would be drawn alike."""
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def _draws(benchmarks: list[tuple[PairedScores, np.ndarray]], seed: int) -> np.ndarray:
    """Relative scores of benchmarks that are drawn together, `[B, draws]`; nan where no unpruned
    answer of a draw scores."""
    known = np.unique(np.concatenate([pictures for _, pictures in benchmarks]))
    sums = [
        np.bincount(np.searchsorted(known, pictures), weights=side, minlength=len(known))
        for scores, pictures in benchmarks
        for side in (scores.pruned, scores.unpruned)
    ]
    found = drawn(*sums, seed=seed)
    above, below = found[0::2], found[1::2]
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


def _few(scores: PairedScores, pictures: np.ndarray) -> bool:
    changed = by_cluster(np.abs(scores.pruned - scores.unpruned), numbered(pictures)) > 0
    return int(changed.sum()) < FEW
