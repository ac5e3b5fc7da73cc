"""Ranking, masking and merging of tokens, which reductions in the vision encoder share.

Shapes: I images of one size, P patches of each, S tokens of the tower (the class token, then the
patches), N tokens of an image, D hidden size, K tokens kept of an image, T tokens that are left of
all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def merged(hidden_ND: Tensor, kept_K: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Every token that is not kept, averaged into the kept one that is nearest by cosine.

    One mean over each kept token and all that go to it, the same in whatever order they come. Of
    kept tokens equally near the first in `kept_K` is taken. In float32.

    Args:
        hidden_ND: `[..., N, D]`, tokens of an image.
        kept_K: `[..., K]`, indices of those that stay; -1 fills up rows of fewer.
        valid_N: `[..., N]`, False for what is no part of the image; None if all are.

    Returns:
        `[..., K, D]`, in the dtype of `hidden_ND`; zeros where `kept_K` is -1.
    """
    return averaged(groups(hidden_ND, kept_K, valid_N), hidden_ND)


def groups(hidden_ND: Tensor, kept_K: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """`[..., K, N]`, the tokens that `merged` averages for each kept one; arguments as there."""
    own_KN = kept_K[..., None] == torch.arange(hidden_ND.shape[-2], device=kept_K.device)
    loose_N = ~own_KN.any(dim=-2)
    if valid_N is not None:
        loose_N &= valid_N
    return own_KN | nearest(hidden_ND.float(), kept_K, loose_N)


def averaged(groups_KN: Tensor, hidden_ND: Tensor) -> Tensor:
    """Means over groups of tokens, in float32, zeros where a group is empty.

    Returns:
        `[..., K, D]`, in the dtype of `hidden_ND`.
    """
    return means(groups_KN, hidden_ND.float()).to(hidden_ND.dtype)


def shared(budget: int, sizes: Sequence[int]) -> list[int]:
    """A number of tokens shared out over parts of an image in proportion to their sizes, none of
    them more than its size; what is left over goes to the largest fractions, the earlier first."""
    total = sum(sizes)
    budget = min(budget, total)
    shares = [budget * size // total for size in sizes]
    fractions = [budget * size % total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda part: -fractions[part])
    for part in order[: budget - sum(shares)]:
        shares[part] += 1
    return shares


def by_attention(attention_IP: Tensor, valid_IP: Tensor | None = None) -> Tensor:
    """Patches of each image by falling attention, of equal ones the lower index first, and behind
    them those that are not valid; `[I, P]`."""
    if valid_IP is not None:
        attention_IP = attention_IP.masked_fill(~valid_IP, -torch.inf)
    return attention_IP.sort(dim=1, descending=True, stable=True).indices


def marked(order_IP: Tensor, counts: Sequence[int]) -> Tensor:
    """True at the first so many indices of each row."""
    count_I1 = torch.tensor(counts, device=order_IP.device)[:, None]
    first_IP = torch.arange(order_IP.shape[1], device=order_IP.device) < count_I1
    return torch.zeros_like(first_IP).scatter(1, order_IP, first_IP)


def indices(mask_IP: Tensor, most: int) -> Tensor:
    """Where a mask is True in each row, rising, filled up with -1 to `[I, most]`."""
    index_IK = mask_IP.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    there_IK = torch.arange(most, device=mask_IP.device) < mask_IP.sum(dim=1, keepdim=True)
    return index_IK.where(there_IK, -1)


def rows(hidden_ND: Tensor, index_K: Tensor) -> Tensor:
    """Tokens at these indices, any where an index is -1."""
    index_KD = index_K.clamp(min=0)[..., None].expand(*index_K.shape, hidden_ND.shape[-1])
    return hidden_ND.gather(-2, index_KD)


def nearest(hidden_ND: Tensor, target_K: Tensor, loose_N: Tensor) -> Tensor:
    """For each target the loose tokens that have no nearer one by cosine, `[..., K, N]`."""
    targets = target_K.shape[-1]
    if targets == 0:
        return loose_N[..., None, :].expand(*target_K.shape, -1)
    unit_ND = F.normalize(hidden_ND, dim=-1)
    cosine_NK = unit_ND @ rows(unit_ND, target_K).mT
    nearest_N = cosine_NK.masked_fill(target_K[..., None, :] < 0, -torch.inf).argmax(dim=-1)
    chosen_KN = nearest_N[..., None, :] == torch.arange(targets, device=nearest_N.device)[:, None]
    return chosen_KN & loose_N[..., None, :] & (target_K >= 0)[..., None]


def means(groups_KN: Tensor, hidden_ND: Tensor) -> Tensor:
    """Mean over each group, zero for one that is empty."""
    # As a product: sums by index depend on their order on a GPU, and with it on the run.
    weights_KN = groups_KN.to(hidden_ND.dtype)
    return weights_KN @ hidden_ND / weights_KN.sum(dim=-1, keepdim=True).clamp(min=1)
