"""VisionZip: what the class token attends to, and the rest merged into a few contextual tokens.

VisionZip (arXiv 2412.04467, section 3), with the arithmetic of its code. Runs in an encoder with a
class token, before its projector.

Shapes: I images of one size, P patches of each, S tokens of the tower (the class token, then the
patches), D its hidden size, E size of a head, C contextual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.encoders.merging import by_attention, indices, marked, means, nearest, rows
from trio.encoders.reduction import CLASS_TOKEN, Reduced, Reduction, TowerShape, TowerStates


class VisionZip(Reduction):
    """Of each image dominant tokens, the class token among them, and contextual ones."""

    name = "visionzip"

    def __call__(self, states: TowerStates, keeps: Sequence[int]) -> Reduced:
        dominant, contextual = zip(*map(zip_split, keeps), strict=True)
        return visionzip(
            states.attention_IP,
            states.deep.mean_keys(),
            states.hidden_ISD,
            dominant,
            contextual,
            states.valid_IP,
        )

    def flops(self, shape: TowerShape, keep: int) -> int:
        """One row of attention, all heads; cosines between the keys of patches and of contextual
        tokens; sums of the patches' hidden states. Products are counted over all patches, as they
        are done; sorting, norms and the mean over heads are not."""
        _, contextual = zip_split(keep)
        similarities = shape.patches * contextual * shape.head_dim
        return shape.row_flops + similarities + shape.merging_flops(contextual)


@dataclass(frozen=True, slots=True)
class Contextual:
    """Which patches VisionZip merges."""

    target_IC: Tensor
    """Patches to which others are added, rising; -1 fills up rows of fewer."""
    group_ICP: Tensor
    """Whether a patch is added to a target; a target itself is in no group."""


def zip_split(keep: int) -> tuple[int, int]:
    """Dominant and contextual tokens that make `keep`, at least 1, in the shares of the published
    settings (54 + 10, 108 + 20, 162 + 30); the class token is a dominant one and always there."""
    contextual = round(10 * keep / 64)
    return keep - contextual, contextual


def visionzip(
    attention_IP: Tensor,
    keys_ISE: Tensor,
    hidden_ISD: Tensor,
    dominant: Sequence[int],
    contextual: Sequence[int],
    valid_IP: Tensor | None = None,
) -> Reduced:
    """Dominant tokens as they are, and contextual ones into which the others are merged.

    VisionZip (arXiv 2412.04467, section 3), with the arithmetic of its code: the class token and
    the patches with the most attention, in the image's order; behind them the contextual tokens.

    Args:
        attention_IP: of the class token to the patches, summed over heads.
        keys_ISE: mean of the heads' keys in the same layer.
        hidden_ISD: hidden states that leave that layer.
        dominant: tokens of each image, 1 or more, among them the class token.
        contextual: tokens of each image; with the dominant ones no more than it has.
        valid_IP: False for patches that are no part of the image; None if all are.
    """
    order_IP = by_attention(attention_IP, valid_IP)
    kept_IP = marked(order_IP, [count - 1 for count in dominant])
    rest_IP = ~kept_IP if valid_IP is None else ~kept_IP & valid_IP
    context = contextual_groups(keys_ISE[:, 1:], rest_IP, contextual)
    wide_IPD = hidden_ISD[:, 1:].float()
    context_ICD = rows(wide_IPD, context.target_IC) + means(context.group_ICP, wide_IPD)
    patch_IP = torch.arange(kept_IP.shape[1], device=kept_IP.device).expand_as(kept_IP)
    return Reduced.of(
        torch.cat((hidden_ISD, context_ICD.to(hidden_ISD.dtype)), dim=1),
        F.pad(torch.cat((patch_IP, context.target_IC), dim=1), (1, 0), value=CLASS_TOKEN),
        F.pad(torch.cat((kept_IP, context.target_IC >= 0), dim=1), (1, 0), value=True),
        [d + c for d, c in zip(dominant, contextual, strict=True)],
    )


def contextual_groups(keys_IPE: Tensor, rest_IP: Tensor, contextual: Sequence[int]) -> Contextual:
    """VisionZip's contextual tokens, and which patches go to each.

    Of n patches that are left, every (n // contextual)-th is a target, the first `contextual` of
    them; each other patch goes to the target with the most similar key, by cosine.

    Args:
        keys_IPE: mean of the heads' keys.
        rest_IP: patches that are not dominant.
        contextual: tokens of each image, at most the patches that are left of it.
    """
    number_I1 = torch.tensor(contextual, device=rest_IP.device)[:, None]
    left_I1 = rest_IP.sum(dim=1, keepdim=True)
    step_I1 = (left_I1 // number_I1.clamp(min=1)).clamp(min=1)
    place_IP = rest_IP.cumsum(dim=1) - 1
    chosen_IP = rest_IP & (place_IP % step_I1 == 0) & (place_IP // step_I1 < number_I1)
    target_IC = indices(chosen_IP, max(contextual, default=0))
    return Contextual(target_IC, nearest(keys_IPE.float(), target_IC, rest_IP & ~chosen_IP))
