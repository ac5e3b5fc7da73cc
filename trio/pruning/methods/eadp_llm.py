"""Method `eadp_llm`: EADP in the language model's own space, where there is no text tower.

EADP (arXiv 2607.02484), as its authors run it on Qwen2.5-VL and Qwen3-VL: visual tokens are
compared with the input embeddings of the prompt's own words. Positions on several axes and what is
injected into the first layers (DeepStack) follow the kept tokens; the released code drops both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Context, OneByOne
from trio.pruning.methods.eadp import cover_by_tile, cover_flops, of_tokens, patches_of
from trio.pruning.relevance import LANGUAGE, importance, instruction, share_out


@dataclass(frozen=True, kw_only=True)
class EadpLlm(OneByOne):
    """Greedy facility location over importance in the decoder's input space."""

    name = "eadp_llm"
    summary = "relevance to the prompt in the decoder's own embedding space"
    before_decoder = True

    alpha: float = 0.5
    """Share of the prompt as a whole in a token's relevance; the rest is that of single words."""
    beta: float = LANGUAGE.beta
    """Exponent of importance; the authors' scripts have 2, the code's default is 1."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"instruction"})

    def choose(
        self, features_VD: Tensor, keep: int, context: Context | None
    ) -> tuple[Tensor, Tensor | None]:
        assert context is not None and context.instruction_LD is not None
        matters_M = importance(
            patches_of(features_VD, context),
            *instruction(context.instruction_LD),
            context.grids,
            replace(LANGUAGE, alpha=self.alpha, beta=self.beta),
        )
        importance_V = of_tokens(matters_M, context)
        return cover_by_tile(importance_V, features_VD, context, keep, share_out), importance_V

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """Also cosines with the words, of which at most the other tokens of the prompt are some."""
        words = tokens - sum(count for count, _ in images)
        compared = sum(count for count, _ in images) * words * shape.hidden_size
        return compared + cover_flops(shape, images)
