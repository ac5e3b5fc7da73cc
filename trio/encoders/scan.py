"""The global-local scan, with merging: what precedes TRIO in its encoder-involved setting.

TRIO (arXiv 2602.04657): half of the budget by attention within windows, half by attention over all,
and every dropped patch averaged into a kept one. In an encoder with a class token it runs before
the projector; choice and merging serve others too, for which a visual token is called a patch.

Shapes: I images of one size, P patches of each, S tokens of the tower (the class token, then the
patches), D its hidden size, K patches kept of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.encoders.merging import by_attention, indices, marked, merged
from trio.encoders.reduction import CLASS_TOKEN, Reduced, Reduction, TowerShape, TowerStates

WINDOW = 6
"""Patches along the edge of a window of the scan."""


class Scan(Reduction):
    """Half of the patches by windows of a shallow layer, half over all of a deep one."""

    name = "scan"
    in_image_order = True

    def __call__(self, states: TowerStates, keeps: Sequence[int]) -> Reduced:
        return scan(
            states.shallow.class_attention(),
            states.attention_IP,
            states.hidden_ISD,
            keeps,
            states.columns,
            with_class=states.with_class,
            valid_IP=states.valid_IP,
        )

    def flops(self, shape: TowerShape, keep: int) -> int:
        """Two rows of attention, cosines between patches and kept ones, sums of hidden states;
        counted as of VisionZip."""
        similarities = shape.patches * keep * shape.hidden_size
        return 2 * shape.row_flops + similarities + shape.merging_flops(keep)


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
    kept_IK = indices(kept_IP, max(patches, default=0))
    class_I1 = torch.tensor(classes, device=kept_IK.device)[:, None] > 0
    return Reduced.of(
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
    kept_IP = marked(_by_window(shallow_IP, columns, edge, valid_IP), local)
    left_IP = ~kept_IP if valid_IP is None else ~kept_IP & valid_IP
    over_all = [count - own for count, own in zip(counts, local, strict=True)]
    return kept_IP | marked(by_attention(deep_IP, left_IP), over_all)


def windows(patches: int, columns: int, edge: int, device: torch.device | None = None) -> Tensor:
    """`[P]`, in which window of `edge` x `edge` each patch of an image lies, counted row by row;
    windows at the right and at the bottom are as large as the image leaves them."""
    place_P = torch.arange(patches, device=device)
    row_P, column_P = place_P // columns // edge, place_P % columns // edge
    return row_P * -(-columns // edge) + column_P


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
