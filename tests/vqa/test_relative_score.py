"""Paired comparisons: that the intervals hold the truth as often as they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from trio.errors import UserError
from trio.vqa.aggregates import METRICS, aggregate
from trio.vqa.intervals import ratio_variance, share_interval, wilson_interval
from trio.vqa.relative_score import compare, compare_figures

VECTORS = Path(__file__).with_name("vectors")


def runs(
    rng: np.random.Generator, pictures: int, kept: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores before and after of 1 to 4 rows a picture, that are right and lost together; a share
    `kept` of what was right stays so, and as much is won as half of what is lost."""
    sizes = rng.integers(1, 5, size=pictures)
    of_row = np.repeat(np.arange(pictures), sizes)
    before = (rng.random(pictures) < 0.7)[of_row]
    lost = (rng.random(pictures) < 1 - kept)[of_row] & before
    won = (rng.random(pictures) < (1 - kept) * 0.7 / 0.3 / 2)[of_row] & ~before
    after = (before & ~lost) | won
    return before.astype(float), after.astype(float), of_row


@pytest.mark.parametrize(
    ("pictures", "kept", "least"), [(150, 0.85, 0.90), (150, 0.99, 0.95), (30, 0.96, 0.95)]
)
def test_intervals_hold_the_truth(
    pictures: int, kept: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio.vqa.relative_score.DRAWS", 400)
    true = -(1 - kept) * 0.7 / 2
    rng = np.random.default_rng(0)
    held = {"difference": 0, "relative": 0}
    trials = 200
    for seed in range(trials):
        found = compare(*runs(rng, pictures, kept), seed=seed)
        assert found.relative_interval is not None
        held["difference"] += found.difference_interval[0] <= true <= found.difference_interval[1]
        relative = 1 + true / 0.7
        held["relative"] += found.relative_interval[0] <= relative <= found.relative_interval[1]
    assert all(count >= least * trials for count in held.values()), held


def test_a_comparison() -> None:
    before = np.array([1.0, 1, 1, 0] * 30)
    after = np.array([1.0, 1, 0, 0, 1, 1, 1, 1] * 15)
    pictures = np.arange(120) // 2
    found = compare(before, after, pictures)
    assert (found.n, found.pictures, found.changed_pictures) == (120, 60, 30)
    assert (found.only_unpruned, found.only_pruned) == (15, 15)
    assert (found.difference, found.relative) == (0, 1)
    assert found.interval_by == "bootstrap"
    low, high = found.difference_interval
    assert -0.2 < low < 0 < high < 0.2
    assert found == compare(before, after, pictures)
    assert found != compare(before, after, pictures, seed=1)


def test_of_means_the_bootstrap_agrees_with_the_formula() -> None:
    before, after, pictures = runs(np.random.default_rng(1), 400, 0.8)
    found = compare(before, after, pictures)
    assert found.relative is not None
    assert found.relative_interval is not None
    spread = 1.96 * ratio_variance(after, before, pictures) ** 0.5
    assert found.relative_interval == pytest.approx(
        (found.relative - spread, found.relative + spread), abs=0.16 * spread
    )


def test_no_change_is_no_certainty() -> None:
    scores = np.array([1.0, 0, 1, 1, 1])
    found = compare(scores, scores, np.arange(5))
    assert found.interval_by == "wilson"
    bound = wilson_interval(0, 5, confidence=0.975)[1]
    assert found.difference_interval == pytest.approx((-bound, bound))
    assert found.relative_interval == pytest.approx((1 - bound / 0.8, 1 + bound / 0.8))
    parts = compare(scores * 0.3, scores * 0.3, np.arange(5))
    assert parts.interval_by == "bootstrap, few changes"
    assert parts.only_unpruned is None


def test_nothing_right_before_has_no_relative_score() -> None:
    found = compare(np.zeros(40), np.ones(40), np.arange(40))
    assert found.relative is None
    assert found.relative_interval is None
    assert found.difference_interval == (1.0, 1.0)


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(UserError, match="no row"):
        compare(np.zeros(0), np.zeros(0), np.zeros(0, int))
    with pytest.raises(UserError, match="3 pictures, but rows: 2 and 3"):
        compare(np.zeros(2), np.zeros(3), np.zeros(3, int))
    with pytest.raises(UserError, match="not finite"):
        compare(np.array([1.0, np.nan]), np.zeros(2), np.zeros(2, int))
    row = {"category": "count", "question_id": "7", "prediction": "Yes", "answer": "Yes"}
    with pytest.raises(UserError, match=r"rows \[0, 1\] count together"):
        compare_figures("mme", [row, row], [row, row], np.arange(2))


def test_pictures_are_any_ids() -> None:
    """A number that no row has is no picture."""
    rng = np.random.default_rng(2)
    before, after, pictures = runs(rng, 40, 0.9)
    names = np.array([f"{picture:03d}.jpg" for picture in range(pictures.max() + 1)])
    expected = compare(before, after, pictures)
    assert compare(before, after, pictures * 7) == expected
    assert compare(before, after, names[pictures]) == expected


def test_a_share_of_rows_in_clusters() -> None:
    hits = np.repeat([1.0, 0, 1, 1], 5)
    apart = np.arange(20)
    assert share_interval(hits, apart) == wilson_interval(15, 20)
    together = np.repeat(np.arange(4), 5)
    low, high = share_interval(hits, together)
    assert low < wilson_interval(15, 20)[0]
    assert high > wilson_interval(15, 20)[1]
    assert share_interval(np.ones(20), together) == wilson_interval(4, 4)


@pytest.mark.parametrize("name", ["pope", "mme", "mmbench", "captions", "chair", "ocrbench"])
def test_figures_that_are_no_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio.vqa.relative_score.DRAWS", 50)
    cases = json.loads((VECTORS / f"{name}.json").read_text())["cases"]
    rows = max((c["call"]["rows"] for c in cases if c["function"] == "aggregate"), key=len)
    pictures = np.zeros(len(rows), int)
    for number, item in enumerate(METRICS[name].items(rows)):
        pictures[list(item.rows)] = number
    worse = [row | {"prediction": "maybe", "mentioned": ["nothing"]} for row in rows]
    figures = compare_figures(name, rows, worse, pictures)
    assert figures.keys() <= aggregate(name, rows).keys()
    same = compare_figures(name, rows, rows, pictures)
    for figure in same.values():
        assert figure.unpruned == figure.pruned
        assert set(figure.difference_interval) == {0.0}
        assert set(figure.relative_interval or (1.0,)) == {1.0}
    assert all(figure.few_changes for figure in same.values())
    one = "accuracy" if "accuracy" in figures else next(iter(figures))
    assert figures[one].unpruned != figures[one].pruned
    alone = compare_figures(name, rows, worse, np.zeros(len(rows), int))
    for name, figure in alone.items():
        assert figure.difference_interval == pytest.approx(
            (figure.pruned - figure.unpruned,) * 2
        ), name
