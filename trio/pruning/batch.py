"""Packed batches: spans of visual tokens, and compaction.

Which tokens stay is worked out on the device; how many of each image is known beforehand, so that
nothing here waits for it.

Shapes: T packed tokens, T' what is left of them, N images that lose tokens, K tokens kept of one at
most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trio.decoder.gpu import on_gpu, sent

Place = tuple[int, int]
"""Of an image: its request, and its number there."""


@dataclass(frozen=True, slots=True)
class Image:
    """The visual tokens of one image that are still in a request's sequence, side by side."""

    start: int
    """Index of the first one in the request."""
    count: int

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

    @classmethod
    def of_spans(cls, lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> Ragged:
        """From the visual spans `(start, stop)` of each request."""
        images = (tuple(Image(start, stop - start) for start, stop in own) for own in spans)
        return cls(tuple(lengths), tuple(images))

    @property
    def starts(self) -> tuple[int, ...]:
        """Packed index of each request's first token."""
        return (0, *accumulate(self.lengths))[:-1]

    def index(self, requests: Sequence[int]) -> Tensor:
        """Packed indices of all tokens of these requests, on the CPU."""
        starts = self.starts
        return _ranges((starts[r], starts[r] + self.lengths[r]) for r in requests)

    def visual(self, request: int | None = None) -> Tensor:
        """Packed indices of the visual tokens of one request, or of all, on the CPU."""
        requests = range(len(self.lengths)) if request is None else (request,)
        starts = self.starts
        return _ranges(
            (starts[r] + image.start, starts[r] + image.start + image.count)
            for r in requests
            for image in self.images[r]
        )

    def visual_tokens(self, request: int) -> int:
        return sum(image.count for image in self.images[request])

    def request_T(self) -> Tensor:
        """The request of each token, on the CPU."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))


def _ranges(spans: Iterable[tuple[int, int]]) -> Tensor:
    pieces = [torch.arange(start, stop) for start, stop in spans]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def compact(ragged: Ragged, goals: Mapping[Place, int], kept_NK: Tensor) -> tuple[Ragged, Tensor]:
    """Drop visual tokens; the host does not wait for their choice.

    Args:
        ragged: the batch as it is.
        goals: tokens to keep of each image that loses some, in the order of requests and images.
        kept_NK: of each the rising local indices to keep; past its own number anything.

    Returns:
        The batch as it will be, and the packed indices that stay, `[T']`, rising, on the device of
        `kept_NK`.
    """
    # Of each token that stays: a packed index, whether something of `kept_NK` is added to it, and
    # row and column of that.
    table = []

    def take(base: np.ndarray, number: int | None = None) -> None:
        column = np.zeros_like(base) if number is None else np.arange(len(base))
        added = np.full_like(base, number is not None)
        table.append(np.stack([base, added, np.full_like(base, number or 0), column]))

    numbers = {place: number for number, place in enumerate(goals)}
    lengths, images = [], []
    for request, (start, length, own) in enumerate(
        zip(ragged.starts, ragged.lengths, ragged.images, strict=True)
    ):
        done = gone = 0
        left = []
        for place, image in enumerate(own):
            keep = goals.get((request, place), image.count)
            left.append(Image(image.start - gone, keep))
            if (request, place) in numbers:
                take(np.arange(start + done, start + image.start))
                take(np.full(keep, start + image.start), numbers[request, place])
                done = image.start + image.count
                gone += image.count - keep
        take(np.arange(start + done, start + length))
        lengths.append(length - gone)
        images.append(tuple(left))
    first_T, is_added_T, row_T, column_T = sent(
        torch.from_numpy(np.concatenate(table, axis=1)), kept_NK.device
    )
    index_T = torch.addcmul(first_T, kept_NK[row_T, column_T], is_added_T)
    return replace(ragged, lengths=tuple(lengths), images=tuple(images)), index_T


def contiguous_positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, 2, ... in each request, packed `[T]`."""
    length_B = torch.tensor(lengths)
    start_B = length_B.cumsum(0) - length_B
    positions = torch.arange(int(length_B.sum())) - start_B.repeat_interleave(length_B)
    return sent(positions, device)


def nothing_if_finite(x_RN: Tensor) -> Tensor:
    """`[R]`, 0 of rows of finite numbers and NaN of others."""
    # All pass on a NaN; on a CPU both at once are ten times as slow.
    low_R, high_R = x_RN.aminmax(dim=-1) if on_gpu(x_RN) else (x_RN.amin(dim=-1), x_RN.amax(dim=-1))
    return (low_R * 0).add_(high_R * 0)


def finite_rows(x_RN: Tensor) -> Tensor:
    """`[R]`, False where a row has a NaN or an infinity; a device is not asked, the outcome stays
    there."""
    return nothing_if_finite(x_RN) == 0


def finite_groups(nothing_R: Tensor, group_R: Tensor, groups: int) -> Tensor:
    """`[groups]`, whether all rows of each are finite, by `nothing_if_finite` of the rows."""
    return nothing_R.new_zeros(groups).index_add_(0, group_R, nothing_R) == 0
