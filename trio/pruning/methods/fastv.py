"""Method `fastv`: by the attention that the prompt's last token pays, in the layer just run.

FastV (arXiv 2403.06764), method section: average over heads, the largest stay. Its published
setting is one stage, `2:K`. At layer 0, where none has run, it is the attention in the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Choice, Method, Stage


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """The tokens of the largest attention; of equal ones the lower index."""

    name = "fastv"
    summary = "attention of the prompt's last token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def __call__(self, stage: Stage) -> Choice:
        attention_T = stage.attention()
        order_NV = stage.rank(attention_T)
        return stage.choice(order_NV[:, : stage.most_kept], order_NV, attention_T)

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """Keys of all tokens, and the last one's query by them in two products, for the rotation's
        cosines and sines."""
        keys = tokens * shape.hidden_size * shape.kv_size
        return keys + shape.hidden_size * shape.query_size + 2 * tokens * shape.query_size
