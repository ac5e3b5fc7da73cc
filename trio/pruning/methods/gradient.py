"""Method `gradient`: by how a loss at the next layer depends on each token.

TRIO (arXiv 2602.04657), method section, without its suppression of near-duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Choice, Method, Stage
from trio.pruning.saliency import Saliency, proxy_rows


@dataclass(frozen=True, kw_only=True)
class Gradient(Method):
    """The tokens of the largest gradients, whether they resemble each other or not."""

    name = "gradient"
    summary = "gradient saliency alone"

    proxy_positions: str
    proxy_layer: str
    proxy_head: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient"})

    def __call__(self, stage: Stage) -> Choice:
        scores = self.score(stage)
        order_NV = stage.rank(scores.scores_T)
        return stage.choice(order_NV[:, : stage.most_kept], order_NV, scores)

    def score(self, stage: Stage) -> Saliency:
        return stage.saliency(self.proxy_positions, self.proxy_layer, self.proxy_head)

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        return shape.proxy_flops(tokens, len(proxy_rows(tokens, self.proxy_positions)))
