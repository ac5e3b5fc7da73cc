"""Packs prompts whose visual tokens the encoder has reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.families.adapter import Features, Span
from trio.families.coordinates import OUTSIDE


@dataclass(frozen=True, slots=True)
class Entry:
    """What is left of packed prompts."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    spans: tuple[tuple[Span, ...], ...]
    """Where each image's tokens stand, in the prompt's own coordinates."""
    index_T: Tensor
    """For each token that is left its place among all packed tokens; an image's follow its
    `Features.sources`. The tower's class token stands where the image begins."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        spans: Sequence[Sequence[Span]],
        features: Sequence[Sequence[Features]],
    ) -> Entry:
        """From whole prompts and the reduced features of their images."""
        index: list[int] = []
        left, places = [], []
        first = 0
        for length, own, images in zip(lengths, spans, features, strict=True):
            begin, done = len(index), 0
            found = []
            for (start, stop), image in zip(own, images, strict=True):
                index += range(first + done, first + start)
                entered = len(index) - begin
                index += [first + start + (source or 0) for source in _sources(image)]
                found.append((entered, entered + len(image)))
                done = stop
            index += range(first + done, first + length)
            left.append(len(index) - begin)
            places.append(tuple(found))
            first += length
        return cls(tuple(left), tuple(places), torch.tensor(index))


def entered(given: Sequence[int], images: Sequence[Features]) -> list[int | None]:
    """What the visual tokens of one prompt stand for among all that the encoder gave.

    Args:
        given: visual tokens of each image before any reduction.
        images: features of each.

    Returns:
        An index for each token that enters the decoder, None for a tower's class token; empty where
        nothing was reduced.
    """
    if not any(image.sources for image in images):
        return []
    starts = (0, *accumulate(given))
    return [
        None if source is None else start + source
        for start, image in zip(starts, images, strict=False)
        for source in _sources(image)
    ]


def before_reduction(scores_V: Tensor, entered: Sequence[int | None], visual_tokens: int) -> Tensor:
    """Scores of the visual tokens that entered the decoder, as those of all that the encoder gave;
    NaN for the others.

    Args:
        scores_V: float32, on the CPU.
        entered: as of the function of that name.
        visual_tokens: that the encoder gave.
    """
    if not entered:
        return scores_V
    # A class token's goes behind all others, and off.
    index_V = torch.tensor([visual_tokens if token is None else token for token in entered])
    given = torch.full((visual_tokens + 1,), torch.nan, dtype=torch.float32)
    return given.index_copy_(0, index_V, scores_V)[:-1]


def coordinates(given_N2: Tensor, image: Features) -> Tensor:
    """Of an image's tokens that enter the decoder, where the encoder gave all those of `given_N2`;
    each is where the one lies that it stands for."""
    if not image.sources:
        return given_N2
    with_class = F.pad(given_N2, (0, 0, 0, 1), value=OUTSIDE)
    return with_class[[-1 if source is None else source for source in image.sources]]


def _sources(image: Features) -> Sequence[int | None]:
    """Where each of an image's tokens comes from; of one that was not reduced, from itself."""
    return image.sources or range(len(image))
