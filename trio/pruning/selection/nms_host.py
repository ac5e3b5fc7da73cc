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

from trio.pruning.selection.farthest import nearness

_BLOCK = 256
_AHEAD = 64


class Rows(Protocol):
    """How tokens resemble all others of their image."""

    def one(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """Cosines of one token of each of some images, `[A, V]`; `likely`: what may come next."""
        ...

    def most(self, image: int, slots: np.ndarray) -> np.ndarray:
        """Cosines `[C, V]` of several tokens of an image."""
        ...

    @property
    def places_NV2(self) -> np.ndarray:
        """Where in its picture each token lies."""
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
        cosines = similar.one(images, slots, lambda: np.flatnonzero(free_NV[0])[:_AHEAD])
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
    near_AV = np.stack(
        [_nearest(similar, image, np.flatnonzero(taken_NV[image])) for image in images]
    )
    places_AV2 = similar.places_NV2[images]
    near_AV[(taken_NV | ~there_NV)[images]] = np.inf
    rooms, place_A = room_N[images], np.arange(len(images))
    for number in range(rooms[0]):
        going = int(np.searchsorted(-rooms, -number))
        own_AV = near_AV[:going]
        slots = own_AV.argmin(axis=1)
        taken_NV[images[:going], slots] = True
        near = similar.one(images[:going], slots, lambda: _lowest(near_AV[0]))
        own_AV[place_A[:going], slots] = np.inf
        own_A12 = places_AV2[place_A[:going], slots][:, None]
        near += nearness(own_A12, places_AV2[:going])[:, 0]
        np.maximum(own_AV, near, out=own_AV)


def _nearest(similar: Rows, image: int, slots: np.ndarray) -> np.ndarray:
    """Of all tokens of an image, how near they are to the nearest of `slots`, `[V]`."""
    place_V2, near_V = similar.places_NV2[image], np.full(similar.places_NV2.shape[1], -np.inf)
    for part in np.split(slots, range(_AHEAD, len(slots), _AHEAD)):
        near_CV = similar.most(image, part) + nearness(place_V2[part], place_V2)
        near_V = np.maximum(near_V, near_CV.max(axis=0))
    return near_V


def _lowest(near_V: np.ndarray) -> np.ndarray:
    """The first ones of equal tokens, as these are taken first."""
    return np.argsort(near_V, kind="stable")[:_AHEAD]


class SimilarityMatrix:
    """All at once, `[N, V, V]`.

    places_NV2: as of `Rows`.
    """

    def __init__(self, cosines_NVV: Tensor, places_NV2: Tensor) -> None:
        self._rows = cosines_NVV.cpu().numpy()
        self.places_NV2 = places_NV2.cpu().numpy()

    @classmethod
    def of(cls, features_TD: Tensor, coordinates_T2: Tensor, index_NV: Tensor) -> SimilarityMatrix:
        """index_NV: packed index of each token in the order."""
        unit_NVD = _unit(features_TD, index_NV)
        return cls(torch.bmm(unit_NVD, unit_NVD.mT), coordinates_T2[index_NV])

    def one(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        return self._rows[images, slots]

    def most(self, image: int, slots: np.ndarray) -> np.ndarray:
        return self._rows[image, slots]


class SimilarityRows:
    """Some rows at a time, of one large image: nothing of the size V x V, or V x D in float32, is
    held.

    index_1V: packed index of each token in the order.
    """

    def __init__(self, features_TD: Tensor, coordinates_T2: Tensor, index_1V: Tensor) -> None:
        self.places_NV2 = coordinates_T2[index_1V].cpu().numpy()
        self._features_TD, self._index_V = features_TD, index_1V[0]
        self._place_of: dict[int, int] = {}
        self._rows = np.empty((0, index_1V.shape[1]))

    def one(
        self, images: np.ndarray, slots: np.ndarray, likely: Callable[[], np.ndarray]
    ) -> np.ndarray:
        (slot,) = slots.tolist()
        if slot not in self._place_of:
            ahead = likely()
            assert ahead[0] == slot
            self._rows = self.most(0, ahead)
            self._place_of = {slot: place for place, slot in enumerate(ahead.tolist())}
        return self._rows[[self._place_of[slot]]]

    def most(self, image: int, slots: np.ndarray) -> np.ndarray:
        slot_C = torch.from_numpy(slots).to(self._index_V.device)
        own_CD = _unit(self._features_TD, self._index_V[slot_C])
        parts = [own_CD @ _unit(self._features_TD, own).T for own in self._index_V.split(_BLOCK)]
        return torch.cat(parts, dim=1).cpu().numpy()


def _unit(features_TD: Tensor, index: Tensor) -> Tensor:
    """Features of unit length, `[..., D]`, in float32 or better.

    What is not finite becomes zeros, which resemble nothing: its request fails, whatever is kept.
    """
    dtype = torch.promote_types(features_TD.dtype, torch.float32)
    return F.normalize(features_TD[index].to(dtype), dim=-1).nan_to_num_(nan=0.0)
