"""Suppression and fill-up on the host, all images of a chunk side by side.

Tokens stand in the order of saliency. A step takes one token of each image and costs a few passes
over `[N, V]`.

Shapes: N images, V visual tokens of the widest, A images that still take tokens, C rows worked out
at a time, D hidden size, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.selection.farthest import add_nearness

_BLOCK = 256
_AHEAD = 64


class Rows(Protocol):
    """How tokens resemble all others of their image."""

    def cosines(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """Of one token of each of some images, `[A, V]`; `likely`: those that may come next."""
        ...

    def nearest(self, image: int, slots: np.ndarray) -> np.ndarray:
        """Of all tokens of an image, how near they are to the nearest of `slots`, `[V]`, places
        counted in. No cosines are asked for afterwards."""
        ...

    def near(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """As `cosines`, places counted in; of images that `nearest` was asked of."""
        ...


def greedy(
    similar: Rows, count_N: np.ndarray, keep_N: np.ndarray, threshold: float, salient_part: int
) -> np.ndarray:
    """Tokens taken `[N, V]`, bool: down the order without near-duplicates, then of those missing
    one of `salient_part` down the order again, the others each time the farthest from all taken."""
    there_NV = np.arange(count_N.max()) < count_N[:, None]
    taken_NV = _suppress(similar, there_NV, keep_N, threshold)
    missing_N = keep_N - taken_NV.sum(axis=1)
    salient_N = missing_N // salient_part
    left_NV = there_NV & ~taken_NV
    taken_NV |= left_NV & (left_NV.cumsum(axis=1) <= salient_N[:, None])
    _farthest(similar, there_NV, taken_NV, missing_N - salient_N)
    return taken_NV


def _suppress(
    similar: Rows, there_NV: np.ndarray, keep_N: np.ndarray, threshold: float
) -> np.ndarray:
    taken_NV, free_NV = np.zeros_like(there_NV), there_NV.copy()
    images = np.arange(len(keep_N))
    for number in range(keep_N.max()):
        # All that still take tokens have taken as many.
        slots = free_NV[images].argmax(axis=1)
        goes_on = free_NV[images, slots] & (keep_N[images] > number)
        images, slots = images[goes_on], slots[goes_on]
        if not len(images):
            break
        taken_NV[images, slots] = True
        cosines = similar.cosines(images, slots, lambda: np.flatnonzero(free_NV[0])[:_AHEAD])
        free_NV[images] &= cosines < threshold
        free_NV[images, slots] = False
    return taken_NV


def _farthest(
    similar: Rows, there_NV: np.ndarray, taken_NV: np.ndarray, room_N: np.ndarray
) -> None:
    """Takes so many tokens more of each image, in place."""
    images = np.argsort(-room_N, kind="stable")[: np.count_nonzero(room_N)]
    if not len(images):
        return
    nearest = [similar.nearest(image, np.flatnonzero(taken_NV[image])) for image in images]
    near_AV = np.stack(nearest)
    near_AV[(taken_NV | ~there_NV)[images]] = np.inf
    rooms, place_A = room_N[images], np.arange(len(images))
    for number in range(rooms[0]):
        going = int(np.searchsorted(-rooms, -number))
        own_AV = near_AV[:going]
        slots = own_AV.argmin(axis=1)
        taken_NV[images[:going], slots] = True
        rows = similar.near(images[:going], slots, lambda: _lowest(near_AV[0]))
        own_AV[place_A[:going], slots] = np.inf
        np.maximum(own_AV, rows, out=own_AV)


def _lowest(near_V: np.ndarray) -> np.ndarray:
    ahead = min(_AHEAD, len(near_V))
    return np.argpartition(near_V, ahead - 1)[:ahead]


class SimilarityMatrix:
    """All at once, `[N, V, V]`.

    index_NV: packed index of each token in the order.
    """

    def __init__(self, features_TD: Tensor, coordinates_T2: Tensor, index_NV: Tensor) -> None:
        unit_NVD = _unit(features_TD, index_NV)
        self._places_NV2 = coordinates_T2[index_NV].cpu()
        self._all_NVV = torch.bmm(unit_NVD, unit_NVD.mT).cpu()
        self._rows = self._all_NVV.numpy()

    def cosines(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        return self._rows[images, slots]

    near = cosines

    def nearest(self, image: int, slots: np.ndarray) -> np.ndarray:
        add_nearness(self._all_NVV[image], *[self._places_NV2[image]] * 2)
        return self._rows[image, slots].max(axis=0)


class SimilarityRows:
    """Some rows at a time, of one large image: nothing of the size V x V, or V x D in float32, is
    held.

    index_V: packed index of each token in the order.
    """

    def __init__(self, features_TD: Tensor, coordinates_T2: Tensor, index_V: Tensor) -> None:
        self._features_TD, self._index_V = features_TD, index_V
        self._places_V2 = coordinates_T2[index_V].cpu()
        self._places_count = False
        self._place_of: dict[int, int] = {}
        self._rows = np.empty((0, len(index_V)))

    def cosines(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        (slot,) = slots.tolist()
        if slot not in self._place_of:
            ahead = likely()
            ahead[0] = slot  # which of equal ones are likely is any
            self._rows = self._work_out(ahead)
            self._place_of = {slot: place for place, slot in enumerate(ahead.tolist())}
        return self._rows[[self._place_of[slot]]]

    near = cosines

    def nearest(self, image: int, slots: np.ndarray) -> np.ndarray:
        self._places_count, self._place_of = True, {}
        parts = np.split(slots, range(_AHEAD, len(slots), _AHEAD))
        return np.maximum.reduce([self._work_out(part).max(axis=0) for part in parts])

    def _work_out(self, slots: np.ndarray) -> np.ndarray:
        slot_C = torch.from_numpy(slots)
        own_CD = _unit(self._features_TD, self._index_V[slot_C.to(self._index_V.device)])
        cosine_CV = torch.cat(
            [own_CD @ _unit(self._features_TD, own).T for own in self._index_V.split(_BLOCK)], dim=1
        ).cpu()
        if self._places_count:
            add_nearness(cosine_CV, self._places_V2[slot_C], self._places_V2)
        return cosine_CV.numpy()


def _unit(features_TD: Tensor, index: Tensor) -> Tensor:
    """Features of unit length, `[..., D]`, in float32 or better.

    What is not finite becomes zeros, which resemble nothing: its request fails, whatever is kept.
    """
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    return F.normalize(features_TD[index].to(dtype), dim=-1).nan_to_num_(nan=0.0)
