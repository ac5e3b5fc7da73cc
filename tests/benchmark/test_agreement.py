"""Loyalty to the unpruned model's own answers."""

import math

import numpy as np
import pytest
import torch

from trio.benchmark.quality.agreement import Agreement, divergence, overlap
from trio.engine.request import Result


def result(tokens: list[int], probabilities: list[float]) -> Result:
    """An answer that ended by itself."""
    return Result(
        id=0,
        token_ids=[*tokens, 9],
        finish_reason="stop",
        first_logprobs=torch.tensor(probabilities).log(),
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], 1.0),
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [], 0.0),
        ([1, 2, 3], [3, 2, 1], 1 / 3),
        ([1, 2, 3, 4], [2, 9, 4], 4 / 7),
        ([2, 9, 4], [1, 2, 3, 4], 4 / 7),
    ],
)
def test_overlap(before: list[int], after: list[int], expected: float) -> None:
    assert overlap(before, after) == pytest.approx(expected)


def test_divergence_in_nats() -> None:
    before = np.log([[0.5, 0.5], [0.9, 0.1]])
    after = np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(before, after) == pytest.approx([expected, 0.0])


def test_agreement() -> None:
    unpruned = [result([1, 2], [0.5, 0.5]), result([3], [0.5, 0.5])]
    same = Agreement.between(unpruned, unpruned)
    assert same == Agreement(exact=1.0, overlap=1.0, kl=0.0)
    other = Agreement.between(unpruned, [unpruned[0], result([4], [0.25, 0.75])])
    assert (other.exact, other.overlap) == (0.5, 0.5)
    assert other.kl == pytest.approx(math.log(4 / 3) / 4)
