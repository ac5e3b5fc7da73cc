"""Method `cdpruner`: diverse visual tokens, conditioned on the prompt.

CDPruner (arXiv 2506.10967): a determinantal point process (DPP) whose kernel is the cosine of two
tokens, scaled by the relevance of both; tokens are chosen by greedy maximum a posteriori inference.
As in the authors' code, cosines with the text count *negatively*. In float32 and on the tensors'
device.

Shapes: B tiles of one image, of equal N; N visual tokens of a tile; P size of the space where text
is compared; M texts, or chunks of one; C size of visual features; K tokens kept of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Context, OneByOne
from trio.pruning.methods.eadp import of_tokens, patches_of
from trio.pruning.relevance import instruction

_EPSILON = 1e-6
# A token of which no larger share than this is new is spanned by the chosen ones: the rest is
# rounding, which the division by its root would only blow up.
_FLOOR = 1e-5
# Relative distance from the best at which the lower index wins.
_TIE = 1e-5


@dataclass(frozen=True, kw_only=True)
class CdPruner(OneByOne):
    """Greedy choice by a determinant; per image, whatever else is in the batch."""

    name = "cdpruner"
    summary = "diversity weighted by relevance to the prompt (conditional DPP)"
    before_decoder = True

    space: Literal["joint", "language"] = "joint"
    """Where images and prompt are compared: in that of the encoder and its text tower, or by the
    decoder's input embeddings, as for Qwen2.5-VL."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_tower" if self.space == "joint" else "instruction"})

    def choose(
        self, features_VD: Tensor, keep: int, context: Context | None
    ) -> tuple[Tensor, Tensor | None]:
        assert context is not None
        patches_MP, texts_CP = self._compared(features_VD, context)
        relevance_V = of_tokens(relevance(patches_MP[None], texts_CP)[0], context)
        return determinantal(relevance_V[None], features_VD[None], keep).order_BK[0], relevance_V

    def _compared(self, features_VD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Patches, and the prompt as a whole."""
        if self.space == "joint":
            assert context.joint_MP is not None and context.text is not None
            return context.joint_MP, context.text.pooled_CP
        assert context.instruction_LD is not None
        _, pooled_1D = instruction(context.instruction_LD)
        return patches_of(features_VD, context), pooled_1D

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """In each round a row of the kernel, and what the rows before explain of it."""
        return sum(count * keep * (shape.hidden_size + (keep - 1) // 2) for count, keep in images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Greedy:
    """A greedy choice."""

    order_BK: Tensor
    """Indices in order of choice; what the kernel's rank does not reach is filled up by index."""
    gain_BK: Tensor
    """By what factor each raised the determinant when it was chosen, 0 where filled up."""


@torch.no_grad()
def relevance(patches_BNP: Tensor, texts_MP: Tensor, *, epsilon: float = _EPSILON) -> Tensor:
    """How unlike the text each token is, float32 `[B, N]`, scaled to (0, 1] over all tiles.

    Args:
        patches_BNP: visual tokens in the space of the text, any floating dtype.
        texts_MP: pooled vectors.
        epsilon: added to the denominator; the authors' code for LLaVA adds none, and so divides by
            zero where all tokens are alike.
    """
    unlike_BN = -cosines(patches_BNP, texts_MP).mean(dim=-1)
    lowest, highest = unlike_BN.aminmax()
    return (unlike_BN - lowest + _EPSILON) / (highest - lowest + epsilon)


def cosines(patches_BNP: Tensor, texts_MP: Tensor) -> Tensor:
    """Of every token with every text, float32 `[B, N, M]`."""
    with torch.autocast(patches_BNP.device.type, enabled=False):
        return unit_length(patches_BNP) @ unit_length(texts_MP).T


@torch.no_grad()
def determinantal(relevance_BN: Tensor, features_BNC: Tensor, keep: int) -> Greedy:
    """Choose, one by one, the token that raises the determinant of the kernel most.

    Of tokens equal up to rounding the first. The chosen rows of the kernel's Cholesky factor are
    all that is held, `[B, K, N]`; the kernel itself is computed row by row.

    Args:
        relevance_BN: not negative.
        features_BNC: visual features as the decoder gets them, any floating dtype.
        keep: tokens to choose of each tile, K.

    Raises:
        ValueError: a tile has fewer tokens than K.
    """
    tiles, tokens = relevance_BN.shape
    if not 0 <= keep <= tokens:
        raise ValueError(f"cannot keep {keep} of {tokens} visual tokens")
    relevance_BN, unit_BNC = relevance_BN.float(), unit_length(features_BNC)
    whole_BN = relevance_BN.square() * unit_BNC.square().sum(dim=-1)
    new_BN = whole_BN.clone()
    taken_BN = torch.zeros_like(whole_BN, dtype=torch.bool)
    factor_BKN = whole_BN.new_zeros((tiles, keep, tokens))
    order_BK = torch.zeros((tiles, keep), dtype=torch.long, device=whole_BN.device)
    gain_BK = whole_BN.new_zeros((tiles, keep))
    for place in range(keep):
        # False of NaN too, so that nothing is taken twice.
        gain_BN = new_BN.where(new_BN > _FLOOR * whole_BN, 0).masked_fill_(taken_BN, -torch.inf)
        choice_B1 = _first_best(gain_BN)
        gain_B1 = gain_BN.gather(1, choice_B1)
        row_BN = kernel_rows(relevance_BN, unit_BNC, choice_B1)[:, 0]
        row_BN = _orthogonal(row_BN, factor_BKN[:, :place], choice_B1) * gain_B1.rsqrt()
        factor_BKN[:, place] = row_BN = row_BN.where(gain_B1 > 0, 0)
        new_BN = new_BN - row_BN.square()
        taken_BN.scatter_(1, choice_B1, True)
        order_BK[:, place : place + 1] = choice_B1
        gain_BK[:, place : place + 1] = gain_B1
    return Greedy(order_BK=order_BK, gain_BK=gain_BK)


def kernel_rows(relevance_BN: Tensor, unit_BNC: Tensor, rows_BR: Tensor) -> Tensor:
    """Rows of the DPP's kernel, `r_i cos_ij r_j`: float32 `[B, R, N]` for indices `[B, R]`."""
    with torch.autocast(unit_BNC.device.type, enabled=False):
        cosine_BRN = unit_BNC.take_along_dim(rows_BR[..., None], dim=1) @ unit_BNC.mT
    return relevance_BN.gather(1, rows_BR)[..., None] * cosine_BRN * relevance_BN[:, None]


def unit_length(features: Tensor) -> Tensor:
    """In float32; zeros stay zeros."""
    return F.normalize(features.float(), dim=-1)


def _first_best(gain_BN: Tensor) -> Tensor:
    """`[B, 1]`, the first index of those with the largest gain up to rounding."""
    best_B1 = gain_BN.amax(dim=1, keepdim=True)
    return (gain_BN >= best_B1 * (1 - _TIE)).byte().argmax(dim=1, keepdim=True)


def _orthogonal(row_BN: Tensor, factor_BTN: Tensor, choice_B1: Tensor) -> Tensor:
    """A row of the kernel without what the rows chosen so far explain of it."""
    own_BT = factor_BTN.take_along_dim(choice_B1[:, None], dim=2)[..., 0]
    with torch.autocast(row_BN.device.type, enabled=False):
        return row_BN - (own_BT[:, None] @ factor_BTN)[:, 0]
