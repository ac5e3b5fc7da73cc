"""Suppression and fill-up as one Triton kernel; import only where Triton is, which CUDA builds of
PyTorch bring.

A choice depends on those before it: one program takes the tokens of one image one after another,
and programs run beside each other. Tokens stand in the order of saliency.

Shapes: N images, V visual tokens of the widest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trio.pruning.selection.farthest import FALL, NEARNESS


def launch(
    dots_NVV: Tensor,
    norm_NV: Tensor,
    places_NV2: Tensor,
    order_NV: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    threshold: float,
    salient_part: int,
) -> Tensor:
    """Choose tokens of several images.

    Args:
        dots_NVV: products of tokens with each other, float32.
        norm_NV: their lengths, float32.
        places_NV2: their places, float32.
        order_NV: their local indices, all of `0 … V-1`.
        count_N: tokens of each image.
        keep_N: tokens to keep of each.
        threshold: cosine from which a token is suppressed.
        salient_part: of the tokens missing then, one of so many is taken by saliency.

    Returns:
        Which tokens stay, uint8 `[N, V]` by local index.
    """
    images, most = order_NV.shape
    stays_NV = order_NV.new_empty(order_NV.shape, dtype=torch.uint8)
    width = triton.next_power_of_2(most)
    choose[(images,)](
        dots_NVV,
        norm_NV.contiguous(),
        places_NV2.contiguous(),
        order_NV.contiguous(),
        count_N.contiguous(),
        keep_N.contiguous(),
        stays_NV,
        most,
        threshold,
        NEARNESS,
        FALL,
        PART=salient_part,
        WIDTH=width,
        num_warps=min(32, max(4, width // 256)),
    )
    return stays_NV


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    dots,
    norms,
    places,
    orders,
    counts,
    keeps,
    stays,
    most,
    threshold,
    nearness,
    fall,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Arguments as of `launch`; `PART`: `salient_part`; `WIDTH`: a power of two, at least V."""
    image = tl.program_id(0).to(tl.int64)
    first = image * most
    slot = tl.arange(0, WIDTH)
    there = slot < tl.load(counts + image).to(tl.int32)
    keep = tl.load(keeps + image).to(tl.int32)
    # A token without length resembles nothing, itself included.
    scale = 1.0 / tl.maximum(tl.load(norms + first + slot, mask=there, other=1.0), 1e-12)
    row = tl.load(places + 2 * (first + slot), mask=there, other=0.0)
    column = tl.load(places + 2 * (first + slot) + 1, mask=there, other=0.0)
    taken = slot < 0
    unlike = there  # no taken token
    near = tl.full([WIDTH], float("-inf"), tl.float32)
    by_saliency = 0
    for number in range(keep):
        own = tl.min(tl.where(unlike, slot, WIDTH), axis=0)
        if own < WIDTH:
            # So many would be taken by then if this were the last that resembles none.
            by_saliency = number + 1 + (keep - number - 1) // PART
        else:
            left = there & (taken == 0)
            if number >= by_saliency:
                least = tl.min(tl.where(left, near, float("inf")), axis=0)
                left = left & (near == least)
            own = tl.min(tl.where(left, slot, WIDTH), axis=0)
        at = first + own
        cosine = tl.load(dots + at * most + slot, mask=there, other=0.0) * scale
        cosine *= 1.0 / tl.maximum(tl.load(norms + at), 1e-12)
        unlike = unlike & (cosine < threshold) & (slot != own)
        taken = taken | (slot == own)
        if PART > 1:
            down, right = row - tl.load(places + 2 * at), column - tl.load(places + 2 * at + 1)
            cosine += nearness * tl.exp(fall * (down * down + right * right))
            near = tl.maximum(near, cosine)
    inside = slot < most
    local = tl.load(orders + first + slot, mask=inside, other=0)
    tl.store(stays + first + local, taken.to(tl.uint8), mask=inside)
