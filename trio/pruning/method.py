"""Base class of pruning methods, the stage that it sees, and the choice that it returns.

Shapes: T packed tokens, A axes of positions, D hidden size; N images that lose tokens, V visual
tokens of the widest of them, K tokens kept of one; of one image M patches, P size of the space that
images and texts share, C texts or pieces of one, L tokens of the longest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trio.decoder.decoder import Decoder
from trio.decoder.gpu import sent
from trio.pruning.batch import Image, Place, Ragged, finite_groups, nothing_if_finite
from trio.pruning.flops import DecoderShape
from trio.pruning.scores.last_token_attention import last_attention
from trio.pruning.scores.layer_gradient import LayerGradient
from trio.pruning.scores.saliency import Saliency, proxy_index, saliency

Grid = tuple[int, int]
"""Rows and columns of patches or tokens."""


class Text(NamedTuple):
    """A text in the space of images and texts, in pieces that the text tower takes whole."""

    tokens_CLP: Tensor
    """Its tokens, between those of begin and end, padded."""
    mask_CL: Tensor
    """True where there is one of its own tokens; on the CPU."""
    pooled_CP: Tensor
    """Each piece as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What encoder and prompt tell of one image, as far as the method's `needs` ask for it."""

    places_V: Tensor
    """For each visual token its patch, counted over `grids`; -1 for what is none, as a newline. On
    the CPU."""
    grids: tuple[Grid, ...] | None = None
    """Rows and columns of the image's tiles, in order; None where its patches stand in no grid."""
    joint_MP: Tensor | None = None
    """Its patches in the space that images and texts share."""
    text: Text | None = None
    """The prompt's own words there."""
    instruction_LD: Tensor | None = None
    """The prompt's own words as the decoder's input embeddings."""

    @property
    def tiles_V(self) -> Tensor | None:
        """The tile of each visual token, on the CPU; what is no patch is a tile of its own. None
        where all are of one."""
        if self.grids is None or len(self.grids) == 1:
            return None
        sizes = torch.tensor([rows * columns for rows, columns in self.grids])
        tile_M = torch.arange(len(sizes)).repeat_interleave(sizes)
        return tile_M[self.places_V.clamp(min=0)].where(self.places_V >= 0, len(sizes))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a stage decided. Tensors lie on the decoder's device, and only who asks for `kept`
    waits for them."""

    goals: Mapping[Place, int]
    """Of the stage."""
    kept_NK: Tensor
    """Of each image of `goals` the rising local indices that stay; past its own number any."""
    orders_N: Sequence[Tensor] = ()
    """Of each its local indices by falling score, or in order of choice; empty for methods without
    an order."""
    scored: Sequence[int] = ()
    """The requests whose saliency was taken, in order."""
    saliency: Saliency | None = None
    """Scores of these requests' tokens, packed; None for methods without."""
    finite_B: Tensor | None = None
    """Of every request, whether all that its images were judged by is finite: else the choice is
    any. None for methods that judge by hidden states alone."""

    scores: Mapping[Place, Tensor] = field(default_factory=dict)
    """Of images of requests that ask for it (`Stage.explained`), what each of their tokens was
    judged by, `[count]`; none for methods that judge by hidden states alone."""

    @cached_property
    def kept(self) -> dict[Place, list[int]]:
        """Local indices that stay of each image that loses tokens."""
        own = zip(self.goals.items(), self.kept_NK.tolist(), strict=True)
        return {place: row[:keep] for (place, keep), row in own}

    @property
    def orders(self) -> dict[Place, Tensor]:
        """`orders_N` by image."""
        return dict(zip(self.goals, self.orders_N, strict=True)) if len(self.orders_N) else {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Images that lose tokens behind some layers of a prefill, and what a method may look at."""

    decoder: Decoder
    layer: int
    """Layers that have run."""
    hidden_TD: Tensor
    """Packed hidden states that leave the last of them, of all requests."""
    positions_T: Tensor
    """Their positions, `[T]` or, on several axes, `[A, T]`."""
    coordinates_T2: Tensor
    """Where in its picture each visual token lies, in edges of a square as large as the picture;
    all alike where that is unknown. Downwards, then to the right."""
    batch: Ragged
    """Lengths and images of all requests at present."""
    goals: dict[Place, int]
    """Tokens to keep of each image that loses some, in the order of requests and images."""
    salts: Sequence[int]
    """Of each request a number made of its tokens, to seed randomness: no batch changes it."""
    entered_TD: Tensor | None = None
    """Hidden states that entered the layer that has just run, or at layer 0 enter the first; for
    methods that need `attention`."""
    contexts: Sequence[Sequence[Context]] = ()
    """Of each request's images, for methods that need `text_tower` or `instruction`."""
    explained: Collection[int] = ()
    """Requests of which `Choice.scores` are wanted."""

    @cached_property
    def requests(self) -> list[int]:
        """Those that lose tokens, rising."""
        return sorted({request for request, _ in self.goals})

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of `requests`."""
        return [self.batch.lengths[request] for request in self.requests]

    @property
    def images(self) -> list[Image]:
        """Those that lose tokens."""
        return [self.batch.images[request][number] for request, number in self.goals]

    @property
    def most_kept(self) -> int:
        """The largest number of tokens to keep of one, K."""
        return max(self.goals.values())

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens of one, V."""
        return max(image.count for image in self.images)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, positions and coordinates of `requests` alone."""
        return self._own(self.hidden_TD, self.positions_T, self.coordinates_T2)

    @property
    def starts(self) -> list[int]:
        """Of each image, its first token among those of `requests`."""
        first = dict(zip(self.requests, Ragged(tuple(self.lengths), ()).starts, strict=True))
        return [first[r] + self.batch.images[r][i].start for r, i in self.goals]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image, `[N]`: first token among those of `requests`, tokens, tokens to keep."""
        counts = [image.count for image in self.images]
        numbers = torch.tensor([self.starts, counts, list(self.goals.values())])
        start_N, count_N, keep_N = sent(numbers, self.hidden_TD.device)
        return start_N, count_N, keep_N

    def saliency(self, proxy_positions: str, proxy_layer: str, proxy_head: str) -> Saliency:
        """Gradient norms of all tokens of `requests`; arguments as in `trio.Pruning`."""
        hidden_TD, positions_T, _ = self.packed
        index = proxy_index(self.layer, proxy_layer)
        return saliency(
            LayerGradient(self.decoder, index, proxy_head),
            hidden_TD,
            positions_T,
            self.lengths,
            proxy_positions,
            [self._hull(request) for request in self.requests],
        )

    def attention(self) -> Tensor:
        """Attention `[T]` that the tokens of `requests` get from the last one of their prompt in
        the layer that has just run; at layer 0, where none has, in the first."""
        assert self.entered_TD is not None, "the method does not say that it needs attention"
        hidden_TD, positions_T, _ = self._own(
            self.entered_TD, self.positions_T, self.coordinates_T2
        )
        layer = max(0, self.layer - 1)
        return last_attention(self.decoder, layer, hidden_TD, positions_T, self.lengths)

    def rank(self, scores_T: Tensor) -> Tensor:
        """Local indices `[N, V]` of each image by falling score of the tokens of `requests`."""
        index_NV, missing_NV = self.index
        return rank(scores_T, index_NV, missing_NV)

    def choice(
        self,
        kept_NK: Tensor,
        order_NV: Tensor,
        scores: Tensor | Saliency | None = None,
        *,
        rising: bool = False,
    ) -> Choice:
        """The outcome for all images at once.

        Args:
            kept_NK: local indices of each image, of which the first that it is to keep count.
            order_NV: local indices of each image in the order to report, of which as many count as
                it has tokens.
            scores: what was judged by, of the tokens of `requests`.
            rising: whether those that count in `kept_NK` rise already.
        """
        saliency = scores if isinstance(scores, Saliency) else None
        scores_T = saliency.scores_T if saliency else scores
        assert not isinstance(scores_T, Saliency)
        if not rising:
            place_K = torch.arange(kept_NK.shape[1], device=kept_NK.device)
            # What does not count goes behind all that does.
            too_many_NK = place_K >= self.bounds[2][:, None]
            kept_NK = kept_NK.masked_fill(too_many_NK, self.most_tokens).sort(dim=1).values
        return Choice(
            goals=self.goals,
            kept_NK=kept_NK,
            orders_N=[
                order_V[: image.count] for order_V, image in zip(order_NV, self.images, strict=True)
            ],
            scored=self.requests if saliency else (),
            saliency=saliency,
            finite_B=None if scores_T is None else self._finite(scores_T),
            scores={} if scores_T is None else self._scores(scores_T),
        )

    def choice_of_orders(self, orders: dict[Place, Tensor], scores: Sequence[Tensor]) -> Choice:
        """The outcome of a choice image by image.

        Args:
            orders: for each image of `goals` the local indices that stay, in order of choice.
            scores: `[V]` of each, what was judged by; empty for hidden states alone.
        """
        orders_N = [orders[place] for place in self.goals]
        order_NK = pad_sequence(orders_N, batch_first=True, padding_value=self.most_tokens)
        finite_B = None
        if scores:
            nothing_N = torch.stack([nothing_if_finite(own_V) for own_V in scores])
            finite_B = self._finite_requests(nothing_N)
        return Choice(
            goals=self.goals,
            kept_NK=sent(order_NK, self.hidden_TD.device).sort(dim=1).values,
            orders_N=orders_N,
            finite_B=finite_B,
            scores={
                place: own_V
                for place, image, own_V in zip(self.goals, self.images, scores, strict=False)
                if place[0] in self.explained and len(own_V) == image.count
            },
        )

    def _scores(self, scores_T: Tensor) -> dict[Place, Tensor]:
        """`Choice.scores` from those of the tokens of `requests`."""
        if not self.explained:
            return {}
        return {
            place: scores_T[start : start + image.count]
            for place, start, image in zip(self.goals, self.starts, self.images, strict=True)
            if place[0] in self.explained
        }

    def _own(self, *of_all: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, positions and coordinates of all requests, to those of `requests`."""
        hidden_TD, positions_T, coordinates_T2 = of_all
        if len(self.requests) == len(self.batch.lengths):
            return hidden_TD, positions_T, coordinates_T2
        index = sent(self.batch.index(self.requests), hidden_TD.device)
        return hidden_TD[index], positions_T[..., index], coordinates_T2[index]

    def _hull(self, request: int) -> tuple[int, int]:
        """From the first to the last token of a request's images that lose tokens."""
        spans = [self.batch.images[r][i].span for r, i in self.goals if r == request]
        return min(spans)[0], max(spans)[1]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """`packed_index` of the images that lose tokens."""
        start_N, count_N, _ = self.bounds
        return packed_index(start_N, count_N, self.most_tokens)

    def _finite(self, scores_T: Tensor) -> Tensor:
        return self._finite_requests(nothing_if_finite(scores_T[self.index[0]]))

    def _finite_requests(self, nothing_N: Tensor) -> Tensor:
        """`Choice.finite_B` by `nothing_if_finite` of each image that loses tokens."""
        request_N = torch.tensor([request for request, _ in self.goals])
        request_N = sent(request_N, nothing_N.device)
        return finite_groups(nothing_N, request_N, len(self.batch.lengths))


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to choose visual tokens. A subclass is a frozen dataclass: its fields are its settings,
    those with the name of a field of `trio.Pruning` are filled from there, and all others by
    `Pruning.method_options`."""

    name: ClassVar[str] = ""
    """Of `--method` and `Pruning.method`."""
    summary: ClassVar[str] = ""
    """What it goes by, in a few words for tables and `--help`."""
    before_decoder: ClassVar[bool] = False
    """Whether it chooses once, on what enters the decoder's first layer, and not at stages."""

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at beside hidden states: `gradient` (`Stage.saliency`), `attention`
        (`Stage.attention`), `coordinates` (`Stage.coordinates_T2`), `text_tower`
        (`Context.joint_MP` and `text`), `instruction` (`Context.instruction_LD`)."""
        return frozenset()

    @abstractmethod
    def __call__(self, stage: Stage) -> Choice:
        """Choose the tokens of a stage in which some image loses tokens."""

    @abstractmethod
    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """Multiply-adds that one stage of the method adds to a prompt.

        Args:
            shape: sizes of the decoder.
            tokens: in the sequence, text and images, before the stage.
            images: of each that loses tokens those before the stage, and how many of these stay.
        """


class OneByOne(Method):
    """A method that chooses from one image at a time."""

    @abstractmethod
    def choose(
        self, features_VD: Tensor, keep: int, context: Context | None
    ) -> tuple[Tensor, Tensor | None]:
        """Choose from one image.

        Args:
            features_VD: hidden states of its tokens.
            keep: tokens to keep, K, fewer than V.
            context: what encoder and prompt tell of it; None where the method needs neither.

        Returns:
            `[K]`, local indices in order of choice, and what it judged by, `[V]`, or None for
            hidden states alone.
        """

    def __call__(self, stage: Stage) -> Choice:
        orders, scores = {}, []
        starts = stage.batch.starts
        for (place, keep), image in zip(stage.goals.items(), stage.images, strict=True):
            request, number = place
            context = stage.contexts[request][number] if stage.contexts else None
            start = starts[request] + image.start
            own_VD = stage.hidden_TD[start : start + image.count]
            order_K, own_V = self.choose(own_VD, keep, context)
            orders[place] = order_K
            scores += [] if own_V is None else [own_V]
        return stage.choice_of_orders(orders, scores)


def choose(method: Method, stage: Stage) -> Choice | None:
    """The choice of a stage; None where no image loses a token."""
    if not stage.goals:
        return None
    # A caller's autocast would score in half precision, and scores would collide.
    with torch.autocast(stage.hidden_TD.device.type, enabled=False):
        return method(stage)


def goals_of(batch: Ragged, keeps: Sequence[Sequence[int] | None]) -> dict[Place, int]:
    """`Stage.goals`.

    keeps: for each request the tokens to keep of each image; None has no stage here.
    """
    return {
        (request, number): keep
        for request, own in enumerate(keeps)
        for number, keep in enumerate(own or ())
        if keep < batch.images[request][number].count
    }


def packed_index(start_N: Tensor, count_N: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Packed index `[N, V]` of each token of each image, past its count that of its last, and where
    that is.

    Args:
        start_N: packed index of each image's first token.
        count_N: tokens of each.
        most: the largest of `count_N`, V.
    """
    place_V = torch.arange(most, device=start_N.device)
    missing_NV = place_V >= count_N[:, None]
    index_NV = start_N[:, None] + place_V.minimum(count_N[:, None] - 1)
    return index_NV, missing_NV


def rank(scores_T: Tensor, index_NV: Tensor, missing_NV: Tensor) -> Tensor:
    """Local indices of each image by falling score; of equal scores the lower index first.

    Args:
        scores_T: packed scores.
        index_NV: as of `packed_index`, like the next.
        missing_NV: where an image has no more tokens.

    Returns:
        `[N, V]`; past an image's count the indices that it does not have.
    """
    scores_NV = scores_T[index_NV].masked_fill_(missing_NV, -torch.inf)
    return scores_NV.sort(dim=1, descending=True, stable=True).indices
