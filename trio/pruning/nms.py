"""Non-maximum suppression in feature space.

TRIO (arXiv 2602.04657): walk down the saliency order, keep a token unless its cosine with a kept
one reaches the threshold, stop at K; if short, fill up from the same order.

Shapes: N images, V visual tokens of the widest image, K tokens kept at most, C candidates looked at
in one round, T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROUND = 64


def suppress(
    features_TD: Tensor,
    starts: Sequence[int],
    counts: Sequence[int],
    orders: Sequence[Sequence[int]],
    keeps: Sequence[int],
    threshold: float,
) -> list[list[int]]:
    """Choose tokens of several images at once.

    The walk goes in rounds of a few candidates of every image: cosines between them and what is
    kept are one product on the device, the decisions are made on the host.

    Args:
        features_TD: packed features.
        starts: packed index of each image's first token.
        counts: visual tokens of each image.
        orders: for each image its local indices, most salient first.
        keeps: tokens to keep of each, at most `counts`.
        threshold: cosine from which a token is suppressed.

    Returns:
        For each image the kept local indices, rising.
    """
    walks = [_Walk(order, keep) for order, keep in zip(orders, keeps, strict=True)]
    assert all(keep <= count for keep, count in zip(keeps, counts, strict=True))
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    kept_NKD = features_TD.new_zeros(
        (len(walks), max(keeps, default=0), features_TD.shape[1]), dtype=dtype
    )
    while any(not walk.done for walk in walks):
        local = [walk.candidates() for walk in walks]
        index_NC = _pad([[s + i for i in own] for s, own in zip(starts, local, strict=True)])
        index_NC = index_NC.to(features_TD.device)
        block_NCD = F.normalize(features_TD[index_NC].to(dtype), dim=-1)
        near_kept = torch.bmm(block_NCD, kept_NKD.transpose(1, 2)) >= threshold
        near_block = torch.bmm(block_NCD, block_NCD.transpose(1, 2)) >= threshold
        near = torch.cat((near_kept, near_block), dim=2).cpu().numpy()
        width = kept_NKD.shape[1]
        places, rows = [], []
        for number, walk in enumerate(walks):
            before = len(walk.kept)
            new = walk.decide(near[number, :, :before], near[number, :, width:])
            places += [(number, before + i) for i in range(len(new))]
            rows += [(number, row) for row in new]
        if places:
            kept_NKD[_split(places, kept_NKD)] = block_NCD[_split(rows, kept_NKD)]
    return [sorted(walk.result()) for walk in walks]


class _Walk:
    """One image's way down its order."""

    def __init__(self, order: Sequence[int], keep: int) -> None:
        self.order = order
        self.keep = keep
        self.kept: list[int] = []
        self._seen = 0

    @property
    def done(self) -> bool:
        return len(self.kept) == self.keep or self._seen == len(self.order)

    def candidates(self) -> Sequence[int]:
        return () if self.done else self.order[self._seen : self._seen + _ROUND]

    def decide(self, near_kept: np.ndarray, near_block: np.ndarray) -> list[int]:
        """Walk one round; the rows of it that were kept."""
        round_ = self.candidates()
        blocked: np.ndarray = np.any(near_kept, axis=1)
        new: list[int] = []
        for row, token in enumerate(round_):
            if len(self.kept) == self.keep:
                break
            if blocked[row]:
                continue
            new.append(row)
            self.kept.append(token)
            blocked |= near_block[:, row]
        self._seen += len(round_)
        return new

    def result(self) -> list[int]:
        taken = set(self.kept)
        missing = self.keep - len(self.kept)
        fill = (token for token in self.order if token not in taken)
        return self.kept + [token for _, token in zip(range(missing), fill, strict=False)]


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of one width; a padding place repeats a packed index and is never read."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _split(pairs: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, device=like.device).unbind(dim=1)
    return first, second
