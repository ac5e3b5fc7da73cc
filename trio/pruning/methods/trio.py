"""Method `trio`: by gradient saliency, without near-duplicates of what is kept.

TRIO (arXiv 2602.04657), method section; `trio.pruning.reference` has it by the book.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Choice, Stage
from trio.pruning.methods.gradient import Gradient
from trio.pruning.selection.nms import suppress_and_fill_up


@dataclass(frozen=True, kw_only=True)
class Trio(Gradient):
    """Score, rank, suppress, fill up."""

    name = "trio"
    summary = "gradient saliency, then suppression of near-duplicates"

    similarity_threshold: float
    fill_up: str

    @property
    def needs(self) -> frozenset[str]:
        mixed = self.fill_up == "mixed"
        return frozenset({"gradient", "coordinates"} if mixed else {"gradient"})

    def __call__(self, stage: Stage) -> Choice:
        hidden_TD, _, coordinates_T2 = stage.packed
        scores = self.score(stage)
        order_NV = stage.rank(scores.scores_T)
        kept_NK = suppress_and_fill_up(
            hidden_TD,
            coordinates_T2,
            stage.index[0],
            *stage.bounds[1:],
            order_NV,
            stage.most_kept,
            self.similarity_threshold,
            self.fill_up,
        )
        return stage.choice(kept_NK, order_NV, scores, rising=True)

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """Cosines of all pairs in one product; of kept tokens with all, in the walk and once more
        where that comes out short, would be fewer, but not where most are kept."""
        cosines = sum(count * max(count, 2 * keep) for count, keep in images)
        return super().flops(shape, tokens, images) + cosines * shape.hidden_size
