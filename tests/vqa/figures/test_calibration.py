"""The expected calibration error by hand, and by plain loops."""

import json
import random
from typing import Any

import pytest

from trio.errors import UserError
from trio.vqa.figures.calibration import calibration


def test_by_hand() -> None:
    found = calibration([0.0, 0.5, 0.6, 0.9, 1.0], [False, True, False, True, True], bins=2)
    first, second = found["bins"]
    assert (first["low"], first["high"], first["n"]) == (0, 0.5, 2)
    assert (first["confidence"], first["accuracy"]) == (0.25, 0.5)
    assert (second["n"], second["small"]) == (3, True)
    assert found["ece"] == pytest.approx((2 * 0.25 + 3 * abs(2 / 3 - 2.5 / 3)) / 5)
    assert json.loads(json.dumps(found)) == found


def test_by_loops() -> None:
    rng = random.Random(0)
    sure = [rng.choice([rng.random(), 1 / 3, 0.2, 1.0]) for _ in range(500)]
    right = [rng.random() < one for one in sure]
    error, sizes = 0.0, []
    for place in range(15):
        inside = [
            (one, hit)
            for one, hit in zip(sure, right, strict=True)
            if place / 15 < one <= (place + 1) / 15 or (place == 0 and one == 0)
        ]
        sizes.append(len(inside))
        if inside:
            error += abs(sum(one for one, _ in inside) - sum(hit for _, hit in inside)) / 500
    found = calibration(sure, right)
    assert found["ece"] == pytest.approx(error)
    assert [one["n"] for one in found["bins"]] == sizes
    assert [one["small"] for one in found["bins"]] == [size < 30 for size in sizes]


def test_of_nothing() -> None:
    found = calibration([], [])
    assert (found["n"], found["ece"], len(found["bins"])) == (0, None, 15)
    assert found["bins"][0]["accuracy"] is None


@pytest.mark.parametrize(
    ("sure", "right", "bins", "fault"),
    [
        ([0.5], [], 15, "1 confidences, but 0"),
        ([1.5], [True], 15, "between 0 and 1"),
        ([float("nan")], [True], 15, "between 0 and 1"),
        ([0.5], [0.5], 15, "neither right nor wrong"),
        ([0.5], [True], 0, "at least 1"),
    ],
)
def test_what_is_refused(sure: list[float], right: list[Any], bins: int, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        calibration(sure, right, bins=bins)
