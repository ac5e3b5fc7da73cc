"""Shares of kept tokens from the NMS and from the fill-up, for method `trio`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.method import Choice, Stage
from trio.pruning.method_registry import replaced
from trio.pruning.methods.trio import Trio


@dataclass(frozen=True, kw_only=True, slots=True)
class FillUp:
    """Means per image, by stage."""

    requests: int
    """On which this was counted, each with one image."""
    layers: list[int]
    """Decoder layers that have run before each stage."""
    suppressed_to: list[float]
    """Tokens that the suppression of near-duplicates left, at most as many as are to be kept."""
    filled_up: list[float]
    """Tokens that made up the number."""


@dataclass(slots=True)
class Count:
    """Of stages, as they happen."""

    by_layer: defaultdict[int, list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """For each image of a stage the tokens left by the suppression, and those kept."""

    def add(self, stage: Stage, choice: Choice, threshold: float) -> None:
        for (request, number), order_V in choice.orders.items():
            kept = choice.kept[request, number]
            start = stage.batch.images[request][number].start
            start += stage.batch.starts[request]
            wanted = set(kept)
            ranked = [start + place for place in order_V.tolist() if place in wanted]
            unlike = survivors(stage.hidden_TD[ranked], threshold)
            self.by_layer[stage.layer].append((unlike, len(kept)))

    def mean(self, requests: int) -> FillUp:
        layers = sorted(self.by_layer)
        pairs = [np.array(self.by_layer[layer], dtype=float).mean(axis=0) for layer in layers]
        return FillUp(
            requests=requests,
            layers=layers,
            suppressed_to=[float(unlike) for unlike, _ in pairs],
            filled_up=[float(kept - unlike) for unlike, kept in pairs],
        )


def survivors(kept_KD: Tensor, threshold: float) -> int:
    """Of kept tokens, most salient first, those that the suppression left.

    The walk over all tokens and the walk over the kept ones alone leave the same: what fills up
    was suppressed by a token that is kept, and comes behind it in the order.
    """
    unit_KD = F.normalize(kept_KD.float(), dim=-1)
    near_KK = (unit_KD @ unit_KD.T >= threshold).numpy(force=True)
    return len(_walk(near_KK))


def _walk(near_KK: np.ndarray) -> Sequence[int]:
    taken: list[int] = []
    for place in range(len(near_KK)):
        if not near_KK[place, taken].any():
            taken.append(place)
    return taken


@contextmanager
def counting() -> Iterator[Count]:
    """Counts what method `trio` keeps in this process."""
    count = Count()

    @dataclass(frozen=True, kw_only=True)
    class Counted(Trio):
        def __call__(self, stage: Stage) -> Choice:
            choice = super().__call__(stage)
            count.add(stage, choice, self.similarity_threshold)
            return choice

    with replaced(Counted):
        yield count
