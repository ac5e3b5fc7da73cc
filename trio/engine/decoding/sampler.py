"""Samples the next tokens.

Shapes: B rows (running requests), V vocabulary.

Each request draws from its own stream of uniform numbers, one per token, and a row's outcome is a
function of that row's logits and its number alone. Neighbours in the batch therefore cannot
change an answer, and the same seed gives the same answer on every device up to rounding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trio.decoder.gpu import Fetched, sent
from trio.engine.request import Sampling


class Chosen:
    """The next token of each row and the natural log of its probability under the model, which is
    NaN where the row's logits are not all finite, and minus infinity where rules leave it nothing
    to choose from; the token is then any.

    On their way to the host from the moment they are chosen; only reading them there waits.
    """

    def __init__(self, tokens_B: Tensor, logprobs_B: Tensor) -> None:
        self.tokens_B = tokens_B
        self._host = Fetched(tokens_B, logprobs_B)

    @cached_property
    def token_ids(self) -> list[int]:
        return self._read(0)

    @property
    def logprobs(self) -> list[float]:
        return self._read(1)

    def _read(self, which: int) -> list[Any]:
        return self._host.read()[which].tolist()


def stream(sampling: Sampling) -> random.Random:
    """The random stream of one request."""
    return random.Random(sampling.seed)


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    streams: Sequence[random.Random],
    ruled_BV: Tensor | None = None,
) -> Chosen:
    """Pick one token per row: the likeliest at temperature 0, a drawn one otherwise.

    samplings: settled ones; None in them is off. ruled_BV: the logits to choose by, where rules of
    decoding have changed them.
    """
    logits_BV = logits_BV.float()
    ruled_BV = logits_BV if ruled_BV is None else ruled_BV
    most_B, tokens_B = ruled_BV.max(dim=-1)
    possible_B = most_B > -torch.inf
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        rows = sent(torch.tensor(drawn), logits_BV.device)
        uniforms = [streams[row].random() for row in drawn]
        probabilities = distribution(ruled_BV[rows], [samplings[row] for row in drawn])
        possible_B[rows] &= probabilities[:, 0].isfinite()
        tokens_B[rows] = _invert(probabilities, uniforms)
    tokens_B = tokens_B.where(possible_B, 0)  # what NaN probabilities draw may be no token at all
    logprobs_B = logits_BV.log_softmax(dim=-1).gather(1, tokens_B[:, None])[:, 0]
    # A NaN and a positive infinity make all of them NaN, the least is the other one.
    finite_B = logprobs_B.isfinite() & logits_BV.amin(dim=-1).isfinite()
    logprobs_B = logprobs_B.where(possible_B, -torch.inf).where(finite_B, torch.nan)
    return Chosen(tokens_B, logprobs_B)


def distribution(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities [B, V] after temperature, top-k, top-p and min-p, in this order."""
    vocabulary = logits_BV.shape[-1]

    def column(values: list[float]) -> Tensor:
        return sent(torch.tensor(values), logits_BV.device)[:, None]

    scaled_BV = logits_BV / column([s.temperature for s in samplings])
    if any(s.top_k for s in samplings):
        ranks = column([min(s.top_k or vocabulary, vocabulary) - 1 for s in samplings]).long()
        smallest_kept = scaled_BV.sort(dim=-1, descending=True).values.gather(1, ranks)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < smallest_kept, -torch.inf)
    probabilities_BV = scaled_BV.softmax(dim=-1)
    top_p = [1.0 if s.top_p is None else s.top_p for s in samplings]
    if min(top_p) < 1:
        ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it fall short of top_p, so the first always does.
        outside = ordered.cumsum(dim=-1) - ordered >= column(top_p)
        outside[:, 0] = False
        probabilities_BV = probabilities_BV.masked_fill(outside.gather(1, order.argsort(-1)), 0)
    if any(s.min_p for s in samplings):
        least_B1 = probabilities_BV.amax(dim=-1, keepdim=True)
        least_B1 = least_B1 * column([s.min_p or 0.0 for s in samplings])
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


def _invert(probabilities_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token at which the cumulative probability passes each row's uniform number."""
    cumulative_BV = probabilities_BV.double().cumsum(dim=-1)
    points_B1 = sent(torch.tensor(uniforms, dtype=torch.double), cumulative_BV.device)[:, None]
    total_B1 = cumulative_BV[:, -1:]
    # Below the total even after rounding: past it lie only tokens without any probability.
    points_B1 = torch.minimum(points_B1 * total_B1, torch.nextafter(total_B1, total_B1 - 1))
    return torch.searchsorted(cumulative_BV, points_B1, right=True)[:, 0]
