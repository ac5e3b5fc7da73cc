"""Packed batches: spans of visual tokens, and compaction.

Shapes: T packed tokens, T' what is left of them, N images of all requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Image:
    """The visual tokens of one image that are still in a request's sequence, side by side."""

    start: int
    """Index of the first one in the request."""
    tokens: tuple[int, ...]
    """Which ones they are, rising, numbered over all visual tokens that the encoder gave for this
    request."""

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.start + self.count


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lengths and images of a packed batch, on the host."""

    lengths: tuple[int, ...]
    """Tokens of each request."""
    images: tuple[tuple[Image, ...], ...]
    """For each request its images in order."""
    given: tuple[int, ...]
    """Visual tokens that the encoder gave for each request."""

    @classmethod
    def of_spans(cls, lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> Ragged:
        """From the visual spans `(start, stop)` of each request before any pruning."""
        images, given = [], []
        for own in spans:
            offsets = [0, *accumulate(stop - start for start, stop in own)]
            images.append(
                tuple(
                    Image(start, tuple(range(offset, offset + stop - start)))
                    for offset, (start, stop) in zip(offsets, own, strict=False)
                )
            )
            given.append(offsets[-1])
        return cls(tuple(lengths), tuple(images), tuple(given))

    @property
    def starts(self) -> tuple[int, ...]:
        """Packed index of each request's first token."""
        return (0, *accumulate(self.lengths))[:-1]

    def index(self, requests: Sequence[int]) -> Tensor:
        """Packed indices of all tokens of these requests, on the CPU."""
        starts = self.starts
        return torch.cat([torch.arange(self.lengths[r]) + starts[r] for r in requests])

    def visual(self) -> tuple[Tensor, Tensor]:
        """Of each visual token that is here, packed index and number over all that the encoder gave
        for the batch."""
        packed: list[int] = []
        encoded: list[int] = []
        first = 0
        for start, given, own in zip(self.starts, self.given, self.images, strict=True):
            for image in own:
                packed += range(start + image.start, start + image.start + image.count)
                encoded += [first + token for token in image.tokens]
            first += given
        return torch.tensor(packed, dtype=torch.int64), torch.tensor(encoded, dtype=torch.int64)

    def visual_tokens(self, request: int) -> int:
        return sum(image.count for image in self.images[request])

    def kept(self, request: int) -> list[int]:
        """The visual tokens of a request that are still here."""
        return [token for image in self.images[request] for token in image.tokens]


Kept = Sequence[Sequence[Sequence[int] | None]]
"""For each request and image the indices to keep, local to what is there; None keeps all."""


def compact(ragged: Ragged, kept: Kept) -> tuple[Ragged, Tensor]:
    """Drop visual tokens.

    Args:
        ragged: the batch as it is.
        kept: rising local indices per request and image, or None where nothing goes.

    Returns:
        The batch as it will be, and the packed indices that stay, `[T']`, rising, on the CPU.
    """
    stays = torch.ones(sum(ragged.lengths), dtype=torch.bool)
    lengths, images = [], []
    for start, length, own, picks in zip(
        ragged.starts, ragged.lengths, ragged.images, kept, strict=True
    ):
        gone = 0
        left = []
        for image, pick in zip(own, picks, strict=True):
            moved = replace(image, start=image.start - gone)
            if pick is not None:
                first = start + image.start
                stays[first : first + image.count] = False
                stays[first + torch.tensor(pick, dtype=torch.int64)] = True
                gone += image.count - len(pick)
                moved = replace(moved, tokens=tuple(image.tokens[i] for i in pick))
            left.append(moved)
        lengths.append(length - gone)
        images.append(tuple(left))
    return replace(ragged, lengths=tuple(lengths), images=tuple(images)), stays.nonzero()[:, 0]


def contiguous_positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, 2, ... in each request, packed `[T]`."""
    length_B = torch.tensor(lengths)
    start_B = length_B.cumsum(0) - length_B
    positions = torch.arange(int(length_B.sum())) - start_B.repeat_interleave(length_B)
    return positions.to(device)


def finite_rows(x_RN: Tensor) -> Tensor:
    """`[R]`, False where a row has a NaN or an infinity; nothing of the size of `x_RN` is held."""
    # Both pass on a NaN. A device is not asked: the outcome stays there.
    return x_RN.amax(dim=-1).isfinite() & x_RN.amin(dim=-1).isfinite()
