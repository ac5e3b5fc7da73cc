"""SCOPE: tokens of the vision tower by saliency times coverage, before its projector.

SCOPE (arXiv 2510.24214, section 3). A patch is salient by what the class token attends to it, and
covers what resembles it; no text is asked. In float32 and on the tensors' device.

Shapes: B images of one size; S tokens of the tower (the class token, then N patches); D its hidden
size; H heads; K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trio.encoders.reduction import Reduced, Reduction, TowerShape, TowerStates, chosen_one_by_one
from trio.pruning.coverage import Combined, Coverage, cover


class Scope(Reduction):
    """Patches alone, in the image's order; nothing is merged."""

    name = "scope"
    in_image_order = True

    def __call__(self, states: TowerStates, keeps: Sequence[int]) -> Reduced:
        return chosen_one_by_one(states, keeps, _patches)

    def flops(self, shape: TowerShape, keep: int) -> int:
        """One row of attention, cosines of all patches, and in each round the gain of every patch
        over all others."""
        return shape.row_flops + shape.patches**2 * (shape.hidden_size + keep)


def _patches(hidden_SD: Tensor, attention_N: Tensor, keep: int) -> Tensor:
    return scope(hidden_SD[None], attention_N[None, None], keep).order_BK[0]


@torch.no_grad()
def scope(
    hidden_BSD: Tensor,
    attention_BHN: Tensor,
    keep: int,
    *,
    alpha: float = 1.0,
    combined: Combined = "product",
) -> Coverage:
    """Choose patches of each image; the class token is dropped.

    Args:
        hidden_BSD: hidden states that leave the second-last layer.
        attention_BHN: of the class token to the patches there, after the softmax.
        keep: tokens to choose of each image, K.
        alpha: exponent of saliency.
        combined: how saliency and coverage make a gain.

    Returns:
        Indices among the tower's tokens, in which patch p is p + 1.

    Raises:
        ValueError: an image has fewer patches than K.
    """
    chosen = cover(
        hidden_BSD[:, 1:],
        keep,
        saliency_BN=saliency(attention_BHN, alpha),
        combined=combined,
        shifted=False,
    )
    return Coverage(order_BK=chosen.order_BK + 1, gain_BK=chosen.gain_BK)


def saliency(attention_BHN: Tensor, alpha: float = 1.0) -> Tensor:
    """The class token's attention summed over heads, to a power; float32 `[B, N]`."""
    return attention_BHN.float().sum(dim=1) ** alpha
