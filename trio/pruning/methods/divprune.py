"""Method `divprune`: tokens as far from each other as can be, whatever the prompt asks.

DivPrune (arXiv 2503.02175), method section: the greedy solution of the max-min diversity problem
with the distance 1 - cosine, on the features that enter the decoder. The first token is, as in the
authors' code, the one whose nearest neighbour is the farthest; each further one has the largest
distance to the nearest that is taken. Theirs may take a token twice when only copies of taken ones
are left, which this never does.

Shapes: T packed tokens, D hidden size; N images, in a group of them V visual tokens of the widest,
K tokens kept at most, C tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Choice, Method, Stage

# Elements [N, V, D] of a group: on a CPU about one image, which its cache then holds; a GPU wants
# many at a time, as each of K steps waits for the one before.
_GROUP = {"cpu": 1 << 18}
_GROUP_ON_DEVICE = 1 << 26
_TILE = 128
_EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """The tokens that `spread_out` takes of the hidden states."""

    name = "divprune"
    summary = "tokens far from each other"
    before_decoder = True

    def __call__(self, stage: Stage) -> Choice:
        keeps = list(stage.goals.values())
        counts = [image.count for image in stage.images]
        order_NK = spread_out(stage.packed[0], stage.bounds[0], counts, keeps)
        own = zip(stage.goals.items(), order_NK, strict=True)
        orders = {place: order_K[:keep] for (place, keep), order_K in own}
        return stage.choice_of_orders(orders, [])

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        """Cosines of all pairs, each once, for the first token, and with all of each that is taken,
        but the last."""
        products = (count * (count - 1) // 2 + (keep - 1) * count for count, keep in images)
        return sum(products) * shape.hidden_size


def spread_out(
    features_TD: Tensor, start_N: Tensor, counts: Sequence[int], keeps: Sequence[int]
) -> Tensor:
    """Take tokens of each image that are far from each other, one by one.

    Computed in float32 or better; of equal distances the lower index. No V x V matrix is held.

    Args:
        features_TD: packed features, any floating dtype.
        start_N: packed index of each image's first token.
        counts: tokens of each image.
        keeps: tokens to take of each, from 1 to its count.

    Returns:
        `[N, K]`, local indices in order of choice; past an image's own number anything.
    """
    order_NK = start_N.new_zeros((len(counts), max(keeps)))
    for group in _groups(counts, features_TD.shape[1], features_TD.device.type):
        index = torch.tensor(group, device=start_N.device)
        most, most_kept = max(counts[i] for i in group), max(keeps[i] for i in group)
        count_N = torch.tensor([counts[i] for i in group], device=start_N.device)
        there_NV = torch.arange(most, device=start_N.device) < count_N[:, None]
        place_NV = start_N[index, None] + there_NV.cumsum(dim=1) - 1
        dtype = torch.promote_types(features_TD.dtype, torch.float32)
        unit_NVD = features_TD[place_NV].to(dtype)
        unit_NVD.div_(torch.linalg.vector_norm(unit_NVD, dim=-1, keepdim=True).clamp_min(_EPSILON))
        order_NK[index, :most_kept] = _greedy(unit_NVD, there_NV, most_kept)
    return order_NK


def _groups(counts: Sequence[int], size: int, device: str) -> Iterator[list[int]]:
    """Images of about one size together, as many as may be looked at at a time."""
    limit = _GROUP.get(device, _GROUP_ON_DEVICE)
    group: list[int] = []
    for image in sorted(range(len(counts)), key=lambda image: -counts[image]):
        if group and counts[group[0]] * (len(group) + 1) * size > limit:
            yield group
            group = []
        group.append(image)
    yield group


def _greedy(unit_NVD: Tensor, there_NV: Tensor, most_kept: int) -> Tensor:
    """`[N, K]`, local indices in order of choice, of tokens of unit length."""
    pick_N = _nearest(unit_NVD, there_NV).masked_fill_(~there_NV, torch.inf).argmin(dim=1)
    # Largest cosine with a taken token; what is not there or taken itself is told apart, as no
    # number is larger than a NaN.
    nearest_NV = torch.full_like(unit_NVD[..., 0], -torch.inf)
    gone_NV = ~there_NV
    picks = [pick_N]
    while len(picks) < most_kept:
        own_N1D = unit_NVD.take_along_dim(pick_N[:, None, None], dim=1)
        nearest_NV = torch.maximum(nearest_NV, _cosines(unit_NVD, own_N1D))
        gone_NV.scatter_(1, pick_N[:, None], True)
        pick_N = nearest_NV.masked_fill(gone_NV, torch.inf).argmin(dim=1)
        picks.append(pick_N)
    return torch.stack(picks, dim=1)


def _cosines(unit_NVD: Tensor, own_N1D: Tensor) -> Tensor:
    """`[N, V]` of all tokens with one.

    Not as a matrix product, whose rounding depends on where a token stands: copies, as the ends of
    an image's rows are in some families, have to tie.
    """
    images, _, size = unit_NVD.shape
    step = max(1, _GROUP.get(unit_NVD.device.type, _GROUP_ON_DEVICE) // (images * size))
    return torch.cat([(x * own_N1D).sum(dim=-1) for x in unit_NVD.split(step, dim=1)], dim=1)


def _nearest(unit_NVD: Tensor, there_NV: Tensor) -> Tensor:
    """Largest cosine `[N, V]` of each token with another; -inf where there is no other.

    Each pair is seen once, or by both sides alike: two tokens that are each other's nearest tie.
    """
    nearest_NV = torch.full_like(unit_NVD[..., 0], -torch.inf)
    for start in range(0, unit_NVD.shape[1], _TILE):
        own, rest = slice(start, start + _TILE), slice(start, None)
        cosine_NCV = torch.bmm(unit_NVD[:, own], unit_NVD[:, rest].transpose(1, 2))
        cosine_NCV.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        pair_NCV = there_NV[:, own, None] & there_NV[:, None, rest]
        cosine_NCV.masked_fill_(~pair_NCV, -torch.inf)
        for part, side in ((own, 2), (rest, 1)):
            nearest_NV[:, part] = torch.maximum(nearest_NV[:, part], cosine_NCV.amax(dim=side))
    return nearest_NV
