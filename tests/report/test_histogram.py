"""Histograms beside numpy."""

import numpy as np
import pytest

from trio.report.histogram import Histogram


@pytest.mark.parametrize("parts", [1, 7])
def test_counts_of_whole_numbers_are_exact_however_they_come(parts: int) -> None:
    values = np.random.default_rng(0).integers(0, 3000, 5000).astype(float)
    one = Histogram()
    for part in np.array_split(values, parts):
        one.add(np.append(part, [np.nan, np.inf]))
    assert (one.n, one.mean) == (5000, values.mean())
    assert (one.counts == np.bincount(values.astype(int))).all()
    for share in (0.05, 0.5, 0.95):
        assert one.quantile(share) == np.quantile(values, share, method="inverted_cdf")
    bars = one.bars(40)
    assert len(bars.count) <= 40 and bars.count.sum() == 5000
    low, high = bars.middle - (bars.width - 1) / 2, bars.middle + (bars.width - 1) / 2
    inside = [((values >= a) & (values <= b)).sum() for a, b in zip(low, high, strict=True)]
    assert inside == bars.count.tolist()


def test_steps_and_decades() -> None:
    shares = Histogram(step=0.005)
    shares.add(np.arange(0, 201) / 200)
    assert (shares.counts == 1).all() and len(shares.counts) == 201
    shares = Histogram(step=0.001)
    shares.add(np.array([0.0296, 0.02962, 0.9]))
    assert shares.quantile(0.5) == pytest.approx(0.030)
    seconds = np.random.default_rng(1).lognormal(0, 2, 4000)
    times = Histogram(per_decade=100)
    times.add(seconds)
    for share in (0.5, 0.95):
        assert times.quantile(share) == pytest.approx(np.quantile(seconds, share), rel=0.04)
    bars = times.bars()
    assert bars.log and bars.count.sum() == 4000
    edges = np.append(bars.middle / 10 ** (bars.width / 2), np.inf)
    counts = np.histogram(np.maximum(seconds, 1e-4), edges * (1 - 1e-9))[0]
    assert np.abs(counts - bars.count).sum() <= 2


def test_nothing_and_one_value() -> None:
    one = Histogram()
    assert (one.mean, one.quantile(0.5), len(one.bars().count)) == (None, None, 0)
    one.add(np.array([7.0, 7.0]))
    assert (one.bars().middle.tolist(), one.bars().count.tolist()) == ([7.0], [2])
    one.add(np.array([1e12]))  # beyond the grid: counted at its end
    assert one.n == 3 and one.counts.sum() == 3
