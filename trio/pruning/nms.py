"""Non-maximum suppression in feature space.

TRIO (arXiv 2602.04657): walk down the saliency order, keep a token unless its cosine with a kept
one reaches the threshold, stop at K; if short, fill up from the same order.

Shapes: N images, V visual tokens of the widest image, K tokens kept at most, C candidates looked at
in one round, T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.walk import device_walk

# On a CPU a round more costs little, and most walks end early; a GPU is not asked whether they did.
_ROUND = {"cpu": 64}
_ROUND_ON_DEVICE = 128

Walk = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Near `[N, C, C]`, blocked `[N, C]`, room `[N]` to the candidates taken `[N, C]`."""


def suppress(
    features_TD: Tensor,
    start_N: Tensor,
    count_N: Tensor,
    order_NV: Tensor,
    keep_N: Tensor,
    most_kept: int,
    threshold: float,
) -> Tensor:
    """Choose tokens of several images at once.

    The walk goes in rounds of some candidates of every image, whose cosines with each other and
    with what is kept are two products: no V x V matrix and no copy of all features is made. All
    tensors lie on one device; on a GPU nothing is read back before the end.

    Args:
        features_TD: packed features.
        start_N: packed index of each image's first token.
        count_N: visual tokens of each image.
        order_NV: for each image its local indices, most salient first; past its count anything in
            `0 … V-1`.
        keep_N: tokens to keep of each, at most its count.
        most_kept: the largest of `keep_N`, on the host.
        threshold: cosine from which a token is suppressed.

    Returns:
        `[N, K]`, for each image the kept local indices, rising; past its own number V.
    """
    images, most = order_NV.shape
    device = features_TD.device
    walk = device_walk(device) or _walk_on_host
    step = _ROUND.get(device.type, _ROUND_ON_DEVICE)
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    # One row more, into which candidates that are not kept are written.
    kept_NKD = features_TD.new_zeros((images, most_kept + 1, features_TD.shape[1]), dtype=dtype)
    slot_K = torch.arange(most_kept, device=device)
    room_N = keep_N.clone()
    taken_NV = torch.zeros_like(order_NV, dtype=torch.bool)
    for first in range(0, most, step):
        if device.type == "cpu" and not ((room_N > 0) & (count_N > first)).any():
            break
        local_NC = order_NV[:, first : first + step]
        there_NC = torch.arange(first, first + local_NC.shape[1], device=device) < count_N[:, None]
        index_NC = start_N[:, None] + local_NC.where(there_NC, 0)
        block_NCD = F.normalize(features_TD[index_NC].to(dtype), dim=-1)
        blocked_NC = ~there_NC
        if first:
            is_kept_NK = slot_K < (keep_N - room_N)[:, None]
            near_kept = torch.bmm(block_NCD, kept_NKD[:, :-1].transpose(1, 2)) >= threshold
            blocked_NC |= (near_kept & is_kept_NK[:, None]).any(dim=2)
        near_NCC = torch.bmm(block_NCD, block_NCD.transpose(1, 2)) >= threshold
        taken_NC = walk(near_NCC, blocked_NC, room_N)
        place_NC = (keep_N - room_N)[:, None] + taken_NC.cumsum(dim=1) - 1
        place_NC = place_NC.where(taken_NC, most_kept)
        kept_NKD.scatter_(1, place_NC[..., None].expand_as(block_NCD), block_NCD)
        taken_NV[:, first : first + step] = taken_NC
        room_N -= taken_NC.sum(dim=1)
    return _filled_up(order_NV, taken_NV, count_N, keep_N, most_kept)


def _filled_up(
    order_NV: Tensor, taken_NV: Tensor, count_N: Tensor, keep_N: Tensor, most_kept: int
) -> Tensor:
    """What was taken, and the first of the others up to the number to keep."""
    most = order_NV.shape[1]
    there_NV = torch.arange(most, device=order_NV.device) < count_N[:, None]
    rank_NV = 2 - 2 * taken_NV.int() - (there_NV & ~taken_NV).int()
    first_NK = rank_NV.argsort(dim=1, stable=True)[:, :most_kept]
    wanted_NK = torch.arange(most_kept, device=order_NV.device) < keep_N[:, None]
    return order_NV.gather(1, first_NK).where(wanted_NK, most).sort(dim=1).values


def _walk_on_host(near_NCC: Tensor, blocked_NC: Tensor, room_N: Tensor) -> Tensor:
    """One round's decisions, candidate by candidate, for all images together."""
    near, blocked = near_NCC.cpu().numpy(), blocked_NC.cpu().numpy().copy()
    room = room_N.cpu().numpy().copy()
    taken = np.zeros_like(blocked)
    for candidate in range(blocked.shape[1]):
        takes = ~blocked[:, candidate] & (room > 0)
        if takes.any():
            taken[:, candidate] = takes
            room -= takes
            blocked |= near[:, candidate] & takes[:, None]
    return torch.from_numpy(taken).to(near_NCC.device)
