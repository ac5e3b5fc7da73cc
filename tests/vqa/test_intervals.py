"""Intervals of what is kept, on outcomes whose truth is known."""

import numpy as np
import pytest

from trio.vqa.intervals import ClusteredBootstrap, wilson_interval


def outcomes(rng: np.random.Generator, scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """Right before and after: three requests a scene, right together or wrong together, and four
    fifths of what was right stays so."""
    before = np.repeat(rng.random(scenes) < 0.9, 3)
    after = before & np.repeat(rng.random(scenes) < 0.8, 3)
    return before, after


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(120), 3)
    covered, alone = 0, 0
    for trial in range(100):
        before, after = outcomes(rng, 120)
        for numbers in (clusters, np.arange(360)):
            bootstrap = ClusteredBootstrap(numbers, seed=trial, resamples=300)
            found = bootstrap.ratio(after, before)
            assert found is not None
            hit = found[0] <= 0.8 <= found[1]
            if numbers is clusters:
                covered += hit
            else:
                alone += hit
    assert 86 <= covered < 100
    # Taken for independent, requests of a scene promise more than they hold.
    assert alone < 76


def test_the_same_seed_gives_the_same_interval() -> None:
    before, after = outcomes(np.random.default_rng(5), 30)
    clusters = np.repeat(np.arange(30), 3)
    first, again, other = (
        ClusteredBootstrap(clusters, seed=seed).ratio(after, before) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert ClusteredBootstrap(clusters, seed=1).ratio(before, before) == (1.0, 1.0)


def test_nothing_right_before_has_no_ratio() -> None:
    bootstrap = ClusteredBootstrap(np.arange(4), seed=0)
    assert bootstrap.ratio(np.ones(4), np.zeros(4)) is None


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # From the formula worked out by hand: at 200 of 200 the lower end is 200 / (200 + z²).
    [(200, 200, 0.98115, 1.0), (0, 10, 0.0, 0.27753), (81, 263, 0.25529, 0.36621)],
)
def test_wilson_interval_of_known_shares(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)
