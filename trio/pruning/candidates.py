"""What a method of pruning chooses from at one stage, and what it says in the end.

Shapes: T packed tokens, A axes of positions, D hidden size; N images that lose tokens, V visual
tokens of the widest of them, P numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trio.pruning.batch import Image, Kept, Ragged
from trio.pruning.finite import finite_rows
from trio.pruning.options import Pruning
from trio.pruning.saliency import Proxy, Saliency

Place = tuple[int, int]
"""Of an image: its request, and its number there."""


@dataclass(frozen=True, slots=True)
class Relevance:
    """What the visual tokens of one image matter for its prompt.

    importance_N: not negative, of the image's N tokens as they enter the decoder.
    tile_N: the tile that each comes from, on the CPU; None if all are of one.
    """

    importance_N: Tensor
    tile_N: Tensor | None = None


@dataclass(slots=True)
class StageChoice:
    """What a stage decided.

    kept: for each request and image the local indices that stay; None where nothing goes.
    scored: the requests whose saliency was taken, in order.
    saliency: scores of these requests' tokens, packed; None for methods without.
    orders: for each pruned image, as `(request, image)`, its local indices by falling score, or in
        order of choice; empty for methods without an order.
    finite_B: of every request, whether all that its images were judged by is finite: else the
        choice is any. None for methods that judge by hidden states alone.
    """

    kept: Kept
    scored: list[int]
    saliency: Saliency | None
    orders: dict[Place, Tensor]
    finite_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Images that lose tokens at a stage, and all that a method may look at.

    pruning: method and settings.
    layer: layers that have run.
    hidden_TD: packed hidden states that leave the last of them, of all requests.
    positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
    coordinates_T2: where in its picture each visual token lies, as in `choose`.
    ragged: lengths and images of all requests at present.
    goals: tokens to keep of each image that loses some, in the order of requests and images.
    salts: a number of each request.
    proxy: makes the stage's proxy.
    attention: attention that the tokens of some requests, rising, get from the last one of their
        prompt in the layer that has just run, packed.
    relevance: of each request's images, where the encoder can tell.
    """

    pruning: Pruning
    layer: int
    hidden_TD: Tensor
    positions_T: Tensor
    coordinates_T2: Tensor
    ragged: Ragged
    goals: dict[Place, int]
    salts: Sequence[int]
    proxy: Callable[[], Proxy]
    attention: Callable[[Sequence[int]], Tensor]
    relevance: Sequence[Sequence[Relevance]] = ()

    @cached_property
    def requests(self) -> list[int]:
        """Those that lose tokens, rising."""
        return sorted({request for request, _ in self.goals})

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of `requests`."""
        return [self.ragged.lengths[request] for request in self.requests]

    @property
    def images(self) -> list[Image]:
        """Those that lose tokens."""
        return [self.ragged.images[request][number] for request, number in self.goals]

    @property
    def most_kept(self) -> int:
        return max(self.goals.values())

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, positions and coordinates of `requests` alone."""
        if len(self.requests) == len(self.ragged.lengths):
            return self.hidden_TD, self.positions_T, self.coordinates_T2
        index = self.ragged.index(self.requests).to(self.hidden_TD.device)
        return self.hidden_TD[index], self.positions_T[..., index], self.coordinates_T2[index]

    def spans(self, request: int) -> list[tuple[int, int]]:
        """Of a request's images that lose tokens."""
        return [self.ragged.images[r][i].span for r, i in self.goals if r == request]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image, `[N]`: first token among those of `requests`, tokens, tokens to keep."""
        first = dict(zip(self.requests, Ragged(tuple(self.lengths), (), ()).starts, strict=True))
        starts = [first[r] + self.ragged.images[r][i].start for r, i in self.goals]
        counts = [image.count for image in self.images]
        numbers = torch.tensor([starts, counts, list(self.goals.values())])
        start_N, count_N, keep_N = numbers.to(self.hidden_TD.device)
        return start_N, count_N, keep_N

    def ranked(self, scores_T: Tensor) -> Tensor:
        """`rank` of all images by scores of the tokens of `requests`."""
        start_N, count_N, _ = self.bounds
        return rank(scores_T, start_N, count_N, max(image.count for image in self.images))

    def finite(self, scores_T: Tensor) -> Tensor:
        """`StageChoice.finite_B` by scores of the tokens of `requests`."""
        start_N, count_N, _ = self.bounds
        place_V = torch.arange(max(image.count for image in self.images), device=scores_T.device)
        index_NV = start_N[:, None] + place_V.minimum(count_N[:, None] - 1)
        return self.by_image(finite_rows(scores_T[index_NV]))

    def by_image(self, finite_N: Tensor) -> Tensor:
        """`StageChoice.finite_B` by whether it holds for each image that loses tokens."""
        request_N = torch.tensor([request for request, _ in self.goals], device=finite_N.device)
        bad_B = torch.zeros(len(self.ragged.lengths), dtype=torch.int32, device=finite_N.device)
        return bad_B.index_add_(0, request_N, (~finite_N).int()) == 0

    def choice(
        self,
        kept_NK: Tensor,
        order_NV: Tensor,
        saliency: Saliency | None = None,
        finite_B: Tensor | None = None,
    ) -> StageChoice:
        """The outcome.

        Args:
            kept_NK: local indices of each image, of which the first that it is to keep count.
            order_NV: local indices of each image in the order to report, of which as many count as
                it has tokens.
            saliency: of `requests`.
            finite_B: see `StageChoice`.
        """
        picks = {
            place: sorted(row[:keep])
            for (place, keep), row in zip(self.goals.items(), kept_NK.tolist(), strict=True)
        }
        orders = {
            place: order[: image.count]
            for place, order, image in zip(self.goals, order_NV, self.images, strict=True)
        }
        scored = [] if saliency is None else self.requests
        return StageChoice(self.by_request(picks), scored, saliency, orders, finite_B)

    def by_request(self, picks: dict[Place, list[int]]) -> Kept:
        """Local indices of the images that lose tokens, as `compact` wants them."""
        return [
            [picks.get((request, number)) for number in range(len(images))]
            for request, images in enumerate(self.ragged.images)
        ]


def rank(scores_T: Tensor, start_N: Tensor, count_N: Tensor, most: int) -> Tensor:
    """Local indices of each image by falling score; of equal scores the lower index first.

    Args:
        scores_T: packed scores.
        start_N: packed index of each image's first token.
        count_N: tokens of each.
        most: the largest of `count_N`, V.

    Returns:
        `[N, V]`; past an image's count the indices that it does not have.
    """
    place_V = torch.arange(most, device=scores_T.device)
    valid_NV = place_V < count_N[:, None]
    index_NV = (start_N[:, None] + place_V).where(valid_NV, start_N[:, None])
    scores_NV = scores_T[index_NV].masked_fill(~valid_NV, -torch.inf)
    return scores_NV.sort(dim=1, descending=True, stable=True).indices
