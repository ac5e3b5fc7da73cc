"""Greedy facility location.

EADP (arXiv 2607.02484, method section) weights what is covered by its importance; SCOPE (arXiv
2510.24214, section 3) weights the candidate by its saliency. Both are the same loop, computed here
in float32 and on the tensors' device.

Shapes: B images or tiles of equal N; N visual tokens; C size of their features; K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.decoder.gpu import on_gpu

Combined = Literal["product", "sum"]
"""How a candidate's saliency and its coverage make one gain."""

# Candidates looked at first in each round on a CPU. Fewer: more of the others have to be looked at
# in the second step, more: more of these in vain.
_FIRST = 16
# Cosine from which two tokens are the same; what lies between it and 1 is rounding.
_SAME = 1 - 2e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """A greedy choice."""

    order_BK: Tensor
    """Indices in order of choice."""
    gain_BK: Tensor
    """What each added when it was chosen."""


@torch.no_grad()
def cover(
    features_BNC: Tensor,
    keep: int,
    *,
    importance_BN: Tensor | None = None,
    saliency_BN: Tensor | None = None,
    combined: Combined = "product",
    shifted: bool = True,
) -> Coverage:
    """Choose tokens one by one, each time the one of the largest gain, of equal ones the first.

    The gain of i is `saliency_i * sum_j importance_j max(0, s_ij - best_j)`, with + in place of the
    first * for `sum`; `s` is `similarity`, `best_j` the largest of it between j and what is chosen
    so far, 0 at first.

    Args:
        features_BNC: any floating dtype.
        keep: tokens to choose of each image, K.
        importance_BN: of what is covered, not negative; None: 1.
        saliency_BN: of the candidates, not negative; None: none.
        combined: see there.
        shifted: see `similarity`.

    Raises:
        ValueError: an image has fewer tokens than K.
    """
    tokens = features_BNC.shape[1]
    if not 0 <= keep <= tokens:
        raise ValueError(f"cannot keep {keep} of {tokens} visual tokens")
    if keep == 0:  # also of a tile without tokens
        none_B0 = torch.zeros(len(features_BNC), 0, device=features_BNC.device)
        return Coverage(order_BK=none_B0.long(), gain_BK=none_B0)
    ones_BN = torch.ones(features_BNC.shape[:2], device=features_BNC.device)
    importance_BN = ones_BN if importance_BN is None else importance_BN.float()
    if saliency_BN is None:
        saliency_BN, combined = ones_BN, "product"
    weights = importance_BN, saliency_BN.float()
    if on_gpu(features_BNC):
        return _all_at_once(similarity(features_BNC, shifted=shifted), keep, *weights, combined)
    # One similarity matrix at a time stays in the CPU's cache.
    chosen = []
    for own_NC, own_N, by_N in zip(features_BNC, *weights, strict=True):
        similar_NN = similarity(own_NC, shifted=shifted).numpy()
        chosen.append(_lazily(similar_NN, keep, own_N.numpy(), by_N.numpy(), combined))
    order, gain = (torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True))
    return Coverage(order_BK=order, gain_BK=gain)


def similarity(features_BNC: Tensor, *, shifted: bool = True) -> Tensor:
    """Cosines of tokens with each other, float32 `[B, N, N]`.

    Tokens that are the same but for rounding get the same row, so that gains tie exactly.

    Args:
        features_BNC: a single image may come without the first dimension.
        shifted: whether cosines are moved from -1 … 1 to 0 … 1.
    """
    with torch.autocast(features_BNC.device.type, enabled=False):
        unit_BNC = F.normalize(features_BNC.float(), dim=-1)
        cosine_BNN = (unit_BNC @ unit_BNC.transpose(-1, -2)).clamp_(-1, 1)
    first_BN = (cosine_BNN >= _SAME).byte().argmax(dim=-1)
    index_N = torch.arange(first_BN.shape[-1], device=first_BN.device)
    # A zero vector resembles nothing, itself included.
    first_BN = torch.where(cosine_BNN.diagonal(dim1=-2, dim2=-1) >= _SAME, first_BN, index_N)
    # A GPU is not asked whether there are any.
    if on_gpu(first_BN) or not torch.equal(first_BN, index_N.expand_as(first_BN)):
        cosine_BNN = cosine_BNN.take_along_dim(first_BN[..., None], dim=-2)
    return cosine_BNN.add_(1).mul_(0.5) if shifted else cosine_BNN


def _all_at_once(
    similar_BNN: Tensor,
    keep: int,
    importance_BN: Tensor,
    saliency_BN: Tensor,
    combined: Combined,
) -> Coverage:
    """Every gain anew in each round, and nothing read back from the device."""
    best_BN = torch.zeros_like(importance_BN)
    taken_BN = torch.zeros_like(importance_BN, dtype=torch.bool)
    order_BK = importance_BN.new_zeros((len(importance_BN), keep), dtype=torch.long)
    gain_BK = importance_BN.new_zeros((len(importance_BN), keep))
    for place in range(keep):
        more_BNN = (similar_BNN - best_BN[:, None]).clamp_(min=0)
        gain_BN = more_BNN.mul_(importance_BN[:, None]).sum(dim=-1)
        gain_BN = gain_BN + saliency_BN if combined == "sum" else gain_BN * saliency_BN
        gain_BN = gain_BN.masked_fill_(taken_BN, -torch.inf)
        choice_B1 = gain_BN.argmax(dim=-1, keepdim=True)
        order_BK[:, place : place + 1] = choice_B1
        gain_BK[:, place : place + 1] = gain_BN.gather(1, choice_B1)
        taken_BN.scatter_(1, choice_B1, True)
        row_B1N = similar_BNN.take_along_dim(choice_B1[..., None], dim=1)
        best_BN = torch.maximum(best_BN, row_B1N[:, 0])
    return Coverage(order_BK=order_BK, gain_BK=gain_BK)


def _lazily(
    similar_NN: np.ndarray,
    keep: int,
    importance_N: np.ndarray,
    saliency_N: np.ndarray,
    combined: Combined,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for one image with few gains computed anew; indices and gains `[K]`.

    A token's gain never grows, so what it was in an earlier round bounds it. Rounding keeps that
    order, as every gain is the same sum over all N: the choice is exactly that of all gains.
    """
    tokens = len(importance_N)
    best_N = np.zeros_like(importance_N)
    bound_N = np.full_like(importance_N, np.inf)
    order_K = np.empty(keep, dtype=np.int64)
    gain_K = np.empty_like(importance_N, shape=keep)
    combine = np.add if combined == "sum" else np.multiply

    def look_again(candidates: np.ndarray) -> None:
        more = similar_NN.take(candidates, axis=0)
        more -= best_N
        np.maximum(more, 0, out=more)
        more *= importance_N
        bound_N[candidates] = combine(more.sum(axis=1), saliency_N[candidates])

    for place in range(keep):
        first = min(_FIRST, tokens - place)
        likely = np.argpartition(bound_N, -first)[-first:]
        look_again(likely)
        look_again(np.flatnonzero(bound_N >= bound_N[likely].max()))
        choice = bound_N.argmax()
        order_K[place], gain_K[place] = choice, bound_N[choice]
        bound_N[choice] = -np.inf
        np.maximum(best_N, similar_NN[choice], out=best_N)
    return order_K, gain_K
