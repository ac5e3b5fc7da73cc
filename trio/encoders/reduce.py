"""Reductions of visual tokens in the encoder.

VisionZip (arXiv 2412.04467) keeps what the class token attends to and merges the rest into a few;
the scan is the one that precedes TRIO in the decoder (arXiv 2602.04657): half by attention within
windows, half by attention over all, and every dropped patch averaged into a kept one. Both run in
an encoder with a class token, before its projector; choice and merging of the scan serve others
too, for which a visual token is called a patch here.

Shapes: I images of one size, P patches of each, S tokens of the tower (the class token, then the
patches), D its hidden size, E size of a head, K patches kept of an image, C contextual tokens,
T tokens that are left of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_TOKEN = -1
"""Stands for the class token among indices of patches."""
WINDOW = 6
"""Patches along the edge of a window of the scan."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What is left of some images.

    tokens_TD: image by image, in the dtype of the hidden states.
    sources_T: for each the patch that it stands for, or `CLASS_TOKEN`.
    lengths: tokens of each image.
    """

    tokens_TD: Tensor
    sources_T: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contextual:
    """Which patches VisionZip merges.

    target_IC: patches to which others are added, rising; -1 fills up rows of fewer.
    group_ICP: whether a patch is added to a target; a target itself is in no group.
    """

    target_IC: Tensor
    group_ICP: Tensor


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
    return own_KN | _nearest(hidden_ND.float(), kept_K, loose_N)


def averaged(groups_KN: Tensor, hidden_ND: Tensor) -> Tensor:
    """Means over groups of tokens, in float32, zeros where a group is empty.

    Returns:
        `[..., K, D]`, in the dtype of `hidden_ND`.
    """
    return _means(groups_KN, hidden_ND.float()).to(hidden_ND.dtype)


def zip_split(keep: int) -> tuple[int, int]:
    """Dominant and contextual tokens that make `keep`, at least 1, in the shares of the published
    settings (54 + 10, 108 + 20, 162 + 30); the class token is a dominant one and always there."""
    contextual = round(10 * keep / 64)
    return keep - contextual, contextual


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
    kept_IP = _marked(order_IP, [count - 1 for count in dominant])
    rest_IP = ~kept_IP if valid_IP is None else ~kept_IP & valid_IP
    context = contextual_groups(keys_ISE[:, 1:], rest_IP, contextual)
    wide_IPD = hidden_ISD[:, 1:].float()
    context_ICD = _rows(wide_IPD, context.target_IC) + _means(context.group_ICP, wide_IPD)
    patch_IP = torch.arange(kept_IP.shape[1], device=kept_IP.device).expand_as(kept_IP)
    return _packed(
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
    target_IC = _indices(chosen_IP, max(contextual, default=0))
    return Contextual(target_IC, _nearest(keys_IPE.float(), target_IC, rest_IP & ~chosen_IP))


def scan(
    shallow_IP: Tensor,
    deep_IP: Tensor,
    hidden_ISD: Tensor,
    keeps: Sequence[int],
    columns: int,
    *,
    with_class: bool = False,
    valid_IP: Tensor | None = None,
) -> Reduced:
    """The global-local scan, with merging (arXiv 2602.04657, its encoder-involved setting).

    Patches are chosen by `scanned`, in windows of 6 x 6. Each dropped patch is averaged into the
    nearest kept one by cosine of their hidden states; tokens stand in the image's order.

    Args:
        shallow_IP: attention of the class token to the patches in an early layer, summed over
            heads.
        deep_IP: the same in the layer that `hidden_ISD` leave.
        hidden_ISD: hidden states.
        keeps: tokens of each image, 1 or more, and no more than it has.
        columns: patches in a row of the image.
        with_class: whether the class token is one of an image's tokens; it then stays, unless one
            patch is all that is kept.
        valid_IP: False for patches that are no part of the image; None if all are.
    """
    classes = [int(with_class and keep > 1) for keep in keeps]
    patches = [keep - own for keep, own in zip(keeps, classes, strict=True)]
    kept_IP = scanned(shallow_IP, deep_IP, patches, columns, WINDOW, valid_IP)
    kept_IK = _indices(kept_IP, max(patches, default=0))
    class_I1 = torch.tensor(classes, device=kept_IK.device)[:, None] > 0
    return _packed(
        torch.cat((hidden_ISD[:, :1], merged(hidden_ISD[:, 1:], kept_IK, valid_IP)), dim=1),
        F.pad(kept_IK, (1, 0), value=CLASS_TOKEN),
        torch.cat((class_I1, kept_IK >= 0), dim=1),
        keeps,
    )


def scanned(
    shallow_IP: Tensor,
    deep_IP: Tensor,
    counts: Sequence[int],
    columns: int,
    edge: int,
    valid_IP: Tensor | None = None,
) -> Tensor:
    """Which patches a scan keeps.

    Half of them, rounded down, are those with the most shallow attention within windows: the best
    of each window, the second best of each, and so on, and in a last round that not all can have
    those with the most. The rest are the patches with the most deep attention among what is left.

    Args:
        shallow_IP: attention that the patches get in an early layer.
        deep_IP: the same in a late one.
        counts: patches to keep of each image, no more than it has.
        columns: patches in a row of the image.
        edge: patches along the edge of a window.
        valid_IP: False for patches that are no part of the image; None if all are.

    Returns:
        `[I, P]`, True for those that stay.
    """
    local = [count // 2 for count in counts]
    kept_IP = _marked(_by_window(shallow_IP, columns, edge, valid_IP), local)
    left_IP = ~kept_IP if valid_IP is None else ~kept_IP & valid_IP
    over_all = [count - own for count, own in zip(counts, local, strict=True)]
    return kept_IP | _marked(by_attention(deep_IP, left_IP), over_all)


def windows(patches: int, columns: int, edge: int, device: torch.device | None = None) -> Tensor:
    """`[P]`, in which window of `edge` x `edge` each patch of an image lies, counted row by row;
    windows at the right and at the bottom are as large as the image leaves them."""
    place_P = torch.arange(patches, device=device)
    row_P, column_P = place_P // columns // edge, place_P % columns // edge
    return row_P * -(-columns // edge) + column_P


def by_attention(attention_IP: Tensor, valid_IP: Tensor | None = None) -> Tensor:
    """Patches of each image by falling attention, of equal ones the lower index first, and behind
    them those that are not valid; `[I, P]`."""
    if valid_IP is not None:
        attention_IP = attention_IP.masked_fill(~valid_IP, -torch.inf)
    return attention_IP.sort(dim=1, descending=True, stable=True).indices


def _by_window(attention_IP: Tensor, columns: int, edge: int, valid_IP: Tensor | None) -> Tensor:
    """Patches of each image by their rank within their window, those of equal rank by falling
    attention; invalid ones last."""
    patches = attention_IP.shape[1]
    place_P = torch.arange(patches, device=attention_IP.device)
    window_P = windows(patches, columns, edge, attention_IP.device)
    order_IP = by_attention(attention_IP, valid_IP)
    # Sorted by window they lie in blocks, of the same sizes in all images.
    blocks_IP = window_P[order_IP].sort(dim=1, stable=True).indices
    sizes_W = window_P.bincount()
    rank_P = place_P - (sizes_W.cumsum(0) - sizes_W)[window_P.sort().values]
    rank_IP = torch.empty_like(order_IP).scatter(1, blocks_IP, rank_P.expand_as(order_IP))
    if valid_IP is not None:
        rank_IP = rank_IP.masked_fill(~valid_IP.gather(1, order_IP), patches)
    return order_IP.gather(1, rank_IP.sort(dim=1, stable=True).indices)


def _marked(order_IP: Tensor, counts: Sequence[int]) -> Tensor:
    """True at the first so many indices of each row."""
    count_I1 = torch.tensor(counts, device=order_IP.device)[:, None]
    first_IP = torch.arange(order_IP.shape[1], device=order_IP.device) < count_I1
    return torch.zeros_like(first_IP).scatter(1, order_IP, first_IP)


def _indices(mask_IP: Tensor, most: int) -> Tensor:
    """Where a mask is True in each row, rising, filled up with -1 to `[I, most]`."""
    index_IK = mask_IP.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    there_IK = torch.arange(most, device=mask_IP.device) < mask_IP.sum(dim=1, keepdim=True)
    return index_IK.where(there_IK, -1)


def _rows(hidden_ND: Tensor, index_K: Tensor) -> Tensor:
    """Tokens at these indices, any where an index is -1."""
    index_KD = index_K.clamp(min=0)[..., None].expand(*index_K.shape, hidden_ND.shape[-1])
    return hidden_ND.gather(-2, index_KD)


def _nearest(hidden_ND: Tensor, target_K: Tensor, loose_N: Tensor) -> Tensor:
    """For each target the loose tokens that have no nearer one by cosine, `[..., K, N]`."""
    targets = target_K.shape[-1]
    if targets == 0:
        return loose_N[..., None, :].expand(*target_K.shape, -1)
    unit_ND = F.normalize(hidden_ND, dim=-1)
    cosine_NK = unit_ND @ _rows(unit_ND, target_K).mT
    nearest_N = cosine_NK.masked_fill(target_K[..., None, :] < 0, -torch.inf).argmax(dim=-1)
    chosen_KN = nearest_N[..., None, :] == torch.arange(targets, device=nearest_N.device)[:, None]
    return chosen_KN & loose_N[..., None, :] & (target_K >= 0)[..., None]


def _means(groups_KN: Tensor, hidden_ND: Tensor) -> Tensor:
    """Mean over each group, zero for one that is empty."""
    # As a product: sums by index depend on their order on a GPU, and with it on the run.
    weights_KN = groups_KN.to(hidden_ND.dtype)
    return weights_KN @ hidden_ND / weights_KN.sum(dim=-1, keepdim=True).clamp(min=1)


def _packed(
    tokens_IXD: Tensor, sources_IX: Tensor, there_IX: Tensor, lengths: Sequence[int]
) -> Reduced:
    return Reduced(tokens_IXD[there_IX], sources_IX[there_IX], tuple(lengths))
