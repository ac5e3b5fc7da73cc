"""Method `eadp`: tokens that together resemble what matters for the prompt.

EADP (arXiv 2607.02484), method section. What matters is told by the space that the encoder shares
with its text tower. Tokens resemble each other by what enters the decoder, as in the published
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Context, OneByOne
from trio.pruning.relevance import (
    Settings,
    Share,
    importance,
    select,
    select_by_tile,
    share_down,
    share_out,
)


@dataclass(frozen=True, kw_only=True)
class Eadp(OneByOne):
    """Greedy facility location over the importance of each image's tokens."""

    name = "eadp"
    summary = "relevance to the prompt in the encoder's image-text space"
    before_decoder = True

    alpha: float = 0.5
    """Share of the text as a whole in a token's relevance; the rest is that of its single words."""
    beta: float = 1.0
    """Exponent of importance."""
    tile_budgets: Literal["remainder", "floor"] = "remainder"
    """How an image's budget is shared out over its tiles: to the last token, or rounded down as in
    the published code, so that some fewer tokens stay."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_tower"})

    def choose(
        self, features_VD: Tensor, keep: int, context: Context | None
    ) -> tuple[Tensor, Tensor | None]:
        assert context is not None and context.joint_MP is not None and context.text is not None
        matters_M = importance(
            context.joint_MP,
            context.text.tokens_CLP,
            context.text.pooled_CP,
            context.grids,
            Settings(alpha=self.alpha, beta=self.beta),
            mask_ML=context.text.mask_CL,
        )
        importance_V = of_tokens(matters_M, context)
        share = share_out if self.tile_budgets == "remainder" else share_down
        return cover_by_tile(importance_V, features_VD, context, keep, share), importance_V

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """What the encoder's side takes is counted there."""
        return cover_flops(shape, images)


def of_tokens(matters_M: Tensor, context: Context) -> Tensor:
    """From what patches matter to what visual tokens do, `[V]`: what is no patch is nothing that
    the kept tokens have to stand for."""
    places_V = context.places_V.to(matters_M.device)
    return matters_M[places_V.clamp(min=0)].where(places_V >= 0, 0)


def cover_by_tile(
    importance_V: Tensor, features_VD: Tensor, context: Context, keep: int, share: Share
) -> Tensor:
    """`select` in each tile, of as many tokens as its importance asks for; `[K]`."""
    tile_V = context.tiles_V
    if tile_V is None:
        return select(importance_V, features_VD, keep)
    by_tile_V = tile_V.argsort(stable=True)
    sizes = tile_V.bincount().tolist()
    index_V = by_tile_V.to(features_VD.device)
    order_K = select_by_tile(importance_V[index_V], features_VD[index_V], sizes, keep, share)
    return index_V[order_K]


def cover_flops(shape: DecoderShape, images: Sequence[tuple[int, int]]) -> int:
    """Cosines of all with all, and in each round the gain of every token over all others."""
    return sum(count**2 * (shape.hidden_size + keep) for count, keep in images)


def patches_of(features_VD: Tensor, context: Context) -> Tensor:
    """Visual tokens `[M, D]` in the order of the image's grids, without what is no patch."""
    places_V = context.places_V.to(features_VD.device)
    order_V = places_V.argsort(stable=True)
    return features_VD[order_V[(places_V < 0).sum() :]]
