"""Agreement of pruned with unpruned answers, right or wrong.

A pruned model may be as often right and yet answer differently. EffiVLM-Bench (arXiv 2506.00479)
therefore measures loyalty to the uncompressed model beside accuracy; here as three figures, from
coarse to fine: equal answers, the overlap of their tokens, and the divergence of the distributions
from which their first tokens are taken, which also moves where no answer changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trio.engine.request import Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of one setting with the unpruned model, over all requests."""

    exact: float
    """Share of requests with equal answers."""
    overlap: float
    """Mean of `overlap`, in [0, 1]."""
    kl: float
    """Mean of `divergence`, in nats."""

    @classmethod
    def between(cls, unpruned: Sequence[Result], pruned: Sequence[Result]) -> Agreement:
        """From results of the same requests in the same order, with first log-probabilities."""
        pairs = [
            (_words(before), _words(after)) for before, after in zip(unpruned, pruned, strict=True)
        ]
        return cls(
            exact=float(np.mean([before == after for before, after in pairs])),
            overlap=float(np.mean([overlap(*pair) for pair in pairs])),
            kl=float(np.mean(divergence(_first(unpruned), _first(pruned)))),
        )


def overlap(before: Sequence[int], after: Sequence[int]) -> float:
    """F-measure of the longest common subsequence of two answers (ROUGE-L, Lin 2004), in [0, 1].

    Unlike an overlap of multisets it tells a red 3 and a blue 5 from a blue 3 and a red 5. Two
    empty answers overlap fully.
    """
    if before == after:
        return 1.0
    return 2 * _common(before, after) / (len(before) + len(after))


def divergence(before_BV: np.ndarray, after_BV: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row, before || after, in nats.

    Args:
        before_BV, after_BV: natural logarithms of probabilities.

    Returns:
        `[B]`, at least 0.
    """
    before_BV, after_BV = (x.astype(np.float64) for x in (before_BV, after_BV))
    terms_BV = np.exp(before_BV) * (before_BV - after_BV)
    # Where both are the same rounding may leave less than nothing.
    return terms_BV.sum(axis=1).clip(min=0.0)


def _words(result: Result) -> list[int]:
    """The answer's tokens without the one that ended it."""
    return result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids


def _first(results: Sequence[Result]) -> np.ndarray:
    rows = [result.first_logprobs for result in results]
    return np.stack([row.numpy() for row in rows if row is not None])


def _common(before: Sequence[int], after: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(after) + 1)
    for own in before:
        diagonal = 0
        for place, other in enumerate(after, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if own == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
