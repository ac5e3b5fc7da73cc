"""Fill-up: what is missing after the NMS, by saliency and by farthest-point sampling.

TRIO's published code takes the most salient of the suppressed tokens. A budget larger than the
number of different things in an image then goes to more of the same few. `mixed` fills up a quarter
so, and the rest by farthest-point sampling: each time the token farthest from all that is kept, by
the cosine of features plus a Gaussian of the distance in the picture.

Shapes: N images, V visual tokens of the widest image, K tokens kept at most, C candidates looked at
in one round, T packed tokens, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.decoder.gpu import on_gpu
from trio.pruning.selection.nms import Walked, tokens_per_round

_BLOCK = 256

# How `mixed` fills up: one of so many missing tokens by saliency; what lying at one place counts
# beside a cosine of 1; and the distance at which that falls to exp(-1/2), in edges of a square as
# large as the picture. Chosen on other scenes than those of the quality tables.
_SALIENT = 4
_NEARNESS = 0.3
_REACH = 1 / 3
_FALL = -1 / (2 * _REACH**2)


def fill_up(features_TD: Tensor, coordinates_T2: Tensor, walked: Walked, rule: str) -> Tensor:
    """As many tokens of each image as it is to keep.

    Args:
        features_TD: packed features.
        coordinates_T2: where in its picture each token lies, in edges of a square as large as the
            picture; all alike where that is unknown.
        walked: what the suppression left.
        rule: as `fill_up` in `trio.Pruning`.

    Returns:
        `[N, K]`, for each image the kept local indices, rising; past its own number V.
    """
    taken_NV = walked.taken_NV
    if rule == "mixed":
        taken_NV = _mixed(features_TD, coordinates_T2, walked)
    # Taken tokens first, then the others by saliency, then what is not there.
    class_NV = 2 - 2 * taken_NV.int() - (walked.there_NV & ~taken_NV).int()
    first_NK = class_NV.argsort(dim=1, stable=True)[:, : walked.most_kept]
    place_K = torch.arange(walked.most_kept, device=taken_NV.device)
    wanted_NK = place_K < walked.keep_N[:, None]
    order_NV = walked.order_NV
    return order_NV.gather(1, first_NK).where(wanted_NK, order_NV.shape[1]).sort(dim=1).values


def _mixed(features_TD: Tensor, coordinates_T2: Tensor, walked: Walked) -> Tensor:
    """Tokens `[N, V]` taken in the end: of those missing some by saliency, the others far from all
    that are taken."""
    index_NV, there_NV, taken_NV = walked.index_NV, walked.there_NV, walked.taken_NV
    salient_N = walked.room_N // _SALIENT
    far_N = walked.room_N - salient_N
    # Both are read back from a device at once.
    most_far, most_taken = torch.stack((far_N.max(), (walked.keep_N - far_N).max())).tolist()
    if not most_far:
        return taken_NV
    free_NV = there_NV & ~taken_NV
    taken_NV = taken_NV | free_NV & (free_NV.cumsum(dim=1) <= salient_N[:, None])
    near_NV = _nearest(features_TD, coordinates_T2, index_NV, taken_NV, most_taken)
    near_NV.masked_fill_(taken_NV | ~there_NV, torch.inf)
    looked_at = features_TD, coordinates_T2, index_NV, near_NV, far_N
    if on_gpu(features_TD):
        far_NV = _farthest(*looked_at, most_far)
    else:
        far_NV = _farthest_on_host(*looked_at)
    return taken_NV | far_NV & there_NV  # beside a NaN nothing is too near


def _nearest(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    taken_NV: Tensor,
    most_taken: int,
) -> Tensor:
    """How near `[N, V]` each token is to the nearest that is taken, of which there are at most
    `most_taken`: their cosine, and how near their places are."""
    slots_NK = taken_NV.int().argsort(dim=1, descending=True, stable=True)[:, :most_taken]
    is_kept_NK = taken_NV.gather(1, slots_NK)
    step = tokens_per_round(features_TD.device)
    kept_NK2 = coordinates_T2[index_NV.gather(1, slots_NK)]
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    kept_NKD = features_TD.new_empty((*slots_NK.shape, features_TD.shape[1]), dtype=dtype)
    for own_NC, part_NCD in zip(
        index_NV.gather(1, slots_NK).split(step, dim=1), kept_NKD.split(step, dim=1), strict=True
    ):
        part_NCD.copy_(F.normalize(features_TD[own_NC].to(dtype), dim=-1))
    pieces = []
    for index_NC in index_NV.split(step, dim=1):
        block_NCD = F.normalize(features_TD[index_NC].to(dtype), dim=-1)
        near_NCK = torch.bmm(block_NCD, kept_NKD.transpose(1, 2))
        near_NCK += _nearness(coordinates_T2[index_NC][:, :, None] - kept_NK2[:, None])
        near_NCK.masked_fill_(~is_kept_NK[:, None], -torch.inf)
        pieces.append(near_NCK.amax(dim=2))
    return torch.cat(pieces, dim=1)


def _nearness(apart_2: Tensor) -> Tensor:
    """By the distances `[..., 2]` of two places along both axes."""
    return apart_2.square().sum(dim=-1).mul_(_FALL).exp_().mul_(_NEARNESS)


def _farthest(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    near_NV: Tensor,
    room_N: Tensor,
    most_room: int,
) -> Tensor:
    """One token of each image after another: that which is least near to the nearest kept one, of
    equal ones the first in the order.

    Args:
        features_TD: packed features.
        coordinates_T2: packed places.
        index_NV: packed indices of each image's tokens, most salient first.
        near_NV: as of `_nearest`; infinite for tokens that are kept or not there. Overwritten.
        room_N: how many to take of each.
        most_room: the largest of `room_N`, on the host.

    Returns:
        Tokens taken `[N, V]`, bool.
    """
    image_N1 = torch.arange(len(index_NV), device=index_NV.device)[:, None]
    norm_NV = _norms(features_TD)[index_NV]
    place_NV2 = coordinates_T2[index_NV]
    taken_NV = torch.zeros_like(near_NV, dtype=torch.bool)
    for number in range(most_room):
        slot_N1 = near_NV.argmin(dim=1, keepdim=True)
        taken_NV.scatter_(1, slot_N1, (room_N > number)[:, None])
        near_NV.scatter_(1, slot_N1, torch.inf)
        own_ND = features_TD[index_NV.gather(1, slot_N1)[:, 0]]
        # One product over the batch as it lies; of its N columns each token needs its image's.
        if own_ND.dtype == near_NV.dtype:
            dot_TN = features_TD @ own_ND.T
        else:
            dot_TN = torch.mm(features_TD, own_ND.T, out_dtype=near_NV.dtype)
        scale_NV = norm_NV * norm_NV.gather(1, slot_N1)
        own_N12 = place_NV2.take_along_dim(slot_N1[..., None], dim=1)
        own_NV = dot_TN[index_NV, image_N1] / scale_NV + _nearness(place_NV2 - own_N12)
        near_NV = torch.maximum(near_NV, own_NV)
    return taken_NV


def _farthest_on_host(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    near_NV: Tensor,
    room_N: Tensor,
) -> Tensor:
    """The same image by image, as a CPU has the features of one in its cache."""
    norm_T = _norms(features_TD).numpy()
    taken = np.zeros(near_NV.shape, bool)
    for image, room in enumerate(room_N.tolist()):
        near, index = near_NV[image].numpy(), index_NV[image].numpy()
        first, last = int(index.min()), int(index.max()) + 1
        local, norm = index - first, norm_T[index]
        row, column = coordinates_T2[first:last].T.contiguous().numpy()[:, local]
        tokens = features_TD[first:last]
        for _ in range(room):
            slot = int(near.argmin())
            taken[image, slot] = True
            near[slot] = np.inf
            dots = _dots(tokens, tokens[local[slot]])[local]
            apart = (row - row[slot]) ** 2 + (column - column[slot]) ** 2
            nearness = _NEARNESS * np.exp(_FALL * apart)
            with np.errstate(invalid="ignore"):  # of features that are not finite
                np.maximum(near, dots / (norm * norm[slot]) + nearness, out=near)
    return torch.from_numpy(taken)


def _dots(tokens_VD: Tensor, own_D: Tensor) -> np.ndarray:
    """`[V]`, in float32 or better, without a copy of all."""
    if own_D.dtype in (torch.float32, torch.float64):
        return (tokens_VD @ own_D).numpy()
    blocks = [block.float() @ own_D.float() for block in tokens_VD.split(_BLOCK)]
    return torch.cat(blocks).numpy()


def _norms(features_TD: Tensor) -> Tensor:
    """Lengths `[T]` in float32 or better; of a token without any a tiny one."""
    wide = torch.promote_types(features_TD.dtype, torch.float32)
    return torch.linalg.vector_norm(features_TD, dim=1, dtype=wide).clamp_(min=1e-12)
