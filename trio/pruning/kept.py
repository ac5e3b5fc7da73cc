"""What the stages of a prefill left, and what they chose it by, on its way to the host.

Shapes: T packed tokens, V visual tokens of one request, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trio.decoder.gpu import Fetched
from trio.pruning.batch import Ragged


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What the tokens of some images were chosen by, image after image; S tokens in all."""

    requests: Sequence[int]
    """Of each image."""
    counts: Sequence[int]
    """Its tokens."""
    token_S: Tensor
    """Their numbers over all that entered, on the device."""
    score_S: Tensor
    """float32, on the device."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a stage left."""

    ragged: Ragged
    token_T: Tensor
    """On the device."""
    requests: Sequence[int]
    """Those that had a stage there."""
    scored: Scored | None
    """What it chose by, as far as that is wanted."""


class Kept:
    """The tokens that the stages left, on their way to the host while the device works on."""

    def __init__(self, left: Sequence[Left], first_tokens: Sequence[int]) -> None:
        self._left, self._first = left, first_tokens
        self._fetched = Fetched(*self._sent()) if left else None

    def _sent(self) -> Iterator[Tensor]:
        yield torch.cat([own.token_T for own in self._left])
        if scored := [own.scored for own in self._left if own.scored is not None]:
            yield torch.cat([own.token_S for own in scored])
            yield torch.cat([own.score_S for own in scored])

    def by_request(self, requests: int) -> list[list[list[int]]]:
        """`Prefilled.kept`; waits for the copy."""
        kept: list[list[list[int]]] = [[] for _ in range(requests)]
        if self._fetched is None:
            return kept
        token_T, *_ = self._fetched.read()
        parts = token_T.split([len(own.token_T) for own in self._left])
        for own, token_T in zip(self._left, parts, strict=True):
            for request in own.requests:
                tokens = token_T[own.ragged.visual(request)] - self._first[request]
                kept[request].append(tokens.tolist())
        return kept

    def scores(self, requests: int, explained: Collection[int]) -> list[list[Tensor]]:
        """`Prefilled.scores`; waits for the copy."""
        found: list[list[Tensor]] = [[] for _ in range(requests)]
        if self._fetched is None or all(own.scored is None for own in self._left):
            return found
        _, token_S, score_S = self._fetched.read()
        has_scores = set()
        done = 0
        for own in self._left:
            for request in explained:
                if request in own.requests:
                    count = self._first[request + 1] - self._first[request]
                    found[request].append(torch.full((count,), torch.nan, dtype=torch.float32))
            if own.scored is None:
                continue
            for request, count in zip(own.scored.requests, own.scored.counts, strict=True):
                place_S = token_S[done : done + count] - self._first[request]
                found[request][-1].index_copy_(0, place_S, score_S[done : done + count])
                has_scores.add(request)
                done += count
        return [own if request in has_scores else [] for request, own in enumerate(found)]
