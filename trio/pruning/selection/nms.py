"""Non-maximum suppression in feature space.

TRIO (arXiv 2602.04657): walk down the saliency order, keep a token unless its cosine with a kept
one reaches the threshold, stop at K.

Shapes: N images, V visual tokens of the widest image, K tokens kept at most, C candidates looked at
in one round, T packed tokens, D hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.decoder.gpu import on_gpu

# On a CPU a round more costs little, and most walks end early; a GPU is not asked whether they did.
_ROUND = {"cpu": 64}
_ROUND_ON_DEVICE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Walked:
    """Where a walk ended: maybe short of the tokens that are to be kept."""

    order_NV: Tensor
    """For each image its local indices, most salient first."""
    index_NV: Tensor
    """The same as packed indices."""
    there_NV: Tensor
    """Which of them the image has."""
    taken_NV: Tensor
    """Which of them are kept."""
    keep_N: Tensor
    """Tokens to keep of each."""
    room_N: Tensor
    """How many of these are missing."""
    most_kept: int
    """The largest of `keep_N`."""


def suppress(
    features_TD: Tensor,
    start_N: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    order_NV: Tensor,
    most_kept: int,
    threshold: float,
) -> Walked:
    """Keep the most salient tokens of several images that are no near-duplicates.

    The walk goes in rounds of some candidates of every image, whose cosines with each other and
    with what is kept are two products: no V x V matrix and no copy of all features is made. All
    tensors lie on one device; on a GPU nothing is read back before the end of the walk.

    Args:
        features_TD: packed features.
        start_N: packed index of each image's first token.
        count_N: visual tokens of each image.
        keep_N: tokens to keep of each, at most its count.
        order_NV: for each image its local indices, most salient first; past its count anything in
            `0 … V-1`.
        most_kept: the largest of `keep_N`, on the host.
        threshold: cosine from which a token is suppressed.
    """
    images, most = order_NV.shape
    device = features_TD.device
    walk = _walk(device)
    step = tokens_per_round(device)
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    # One row more, into which candidates that are not kept are written.
    kept_NKD = features_TD.new_zeros((images, most_kept + 1, features_TD.shape[1]), dtype=dtype)
    slot_K = torch.arange(most_kept, device=device)
    room_N = keep_N.clone()
    there_NV = torch.arange(most, device=device) < count_N[:, None]
    index_NV = start_N[:, None] + order_NV.where(there_NV, 0)
    taken_NV = torch.zeros_like(there_NV)
    for first in range(0, most, step):
        if not on_gpu(device) and not ((room_N > 0) & (count_N > first)).any():
            break
        index_NC = index_NV[:, first : first + step]
        block_NCD = F.normalize(features_TD[index_NC].to(dtype), dim=-1)
        blocked_NC = ~there_NV[:, first : first + step]
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
    return Walked(
        order_NV=order_NV,
        index_NV=index_NV,
        there_NV=there_NV,
        taken_NV=taken_NV,
        keep_N=keep_N,
        room_N=room_N,
        most_kept=most_kept,
    )


def tokens_per_round(device: torch.device) -> int:
    """Candidates that are looked at together, C."""
    return _ROUND.get(device.type, _ROUND_ON_DEVICE)


Walk = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Near `[N, C, C]`, blocked `[N, C]`, room `[N]` to the candidates taken `[N, C]`."""


def _walk(device: torch.device) -> Walk:
    """One round's decisions, on a GPU where Triton is and else on the host."""
    if on_gpu(device) and importlib.util.find_spec("triton") is not None:
        return walk_on_device
    return _walk_on_host


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


def walk_on_device(near_NCC: Tensor, blocked_NC: Tensor, room_N: Tensor) -> Tensor:
    """The same by a Triton kernel, so that nothing has to come to the host.

    Args:
        near_NCC: whether two candidates suppress each other.
        blocked_NC: whether a candidate is suppressed already, or none.
        room_N: how many each image may still take.

    Returns:
        Candidates taken `[N, C]`, bool.
    """
    from trio.pruning.selection import nms_kernel

    images, candidates = blocked_NC.shape
    taken_NC = torch.empty_like(blocked_NC, dtype=torch.uint8)
    nms_kernel.walk[(images,)](
        near_NCC.contiguous().view(torch.uint8),
        blocked_NC.contiguous().view(torch.uint8),
        room_N,
        taken_NC,
        candidates,
        WIDTH=1 << (candidates - 1).bit_length(),
    )
    return taken_NC.view(torch.bool)
