"""Base class and registry of reductions in a vision tower with a class token.

Shapes: I images of one size, P patches of each, S tokens of the tower (the class token, then the
patches), H heads of size E, D hidden size of the tower, T tokens that are left of all images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.encoders.clip_hooks import Watched
from trio.pruning.method_registry import class_named

CLASS_TOKEN = -1
"""Stands for the class token among indices of patches."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What is left of some images."""

    tokens_TD: Tensor
    """Image by image, in the dtype of the hidden states."""
    sources_T: Tensor
    """For each the patch that it stands for, or `CLASS_TOKEN`."""
    lengths: tuple[int, ...]
    """Tokens of each image."""

    @classmethod
    def of(
        cls, tokens_IXD: Tensor, sources_IX: Tensor, there_IX: Tensor, lengths: Sequence[int]
    ) -> Reduced:
        """From rows of one width, of which so many are there."""
        return cls(tokens_IXD[there_IX], sources_IX[there_IX], tuple(lengths))


@dataclass(frozen=True, kw_only=True)
class TowerStates:
    """What a forward of the tower left."""

    hidden_ISD: Tensor
    """Hidden states that become features."""
    deep: Watched
    """The layer that they leave."""
    shallow: Watched
    """An early one."""
    columns: int
    """Patches in a row of the image."""
    with_class: bool
    """Whether the class token is one of the model's own features."""
    valid_IP: Tensor | None
    """False for patches that are no part of the image; None if all are."""

    @cached_property
    def attention_IP(self) -> Tensor:
        """Of the class token to the patches in the deep layer, after the softmax, summed over
        heads; float32."""
        return self.deep.class_attention()


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerShape:
    """Sizes of a tower, for one picture that it takes."""

    patches: int
    tokens: int
    """Patches and the class token."""
    hidden_size: int
    head_dim: int

    @property
    def row_flops(self) -> int:
        """One row of attention, all heads."""
        return self.tokens * self.hidden_size

    def merging_flops(self, targets: int) -> int:
        """Sums of hidden states into so many tokens."""
        return self.patches * targets * self.hidden_size


class Reduction(ABC):
    """A way to leave fewer tokens of the tower's."""

    name: ClassVar[str] = ""
    in_image_order: ClassVar[bool] = False
    """Whether tokens of all tiles are put where the model has them; else they stand tile by tile,
    each tile's as they come."""

    @abstractmethod
    def __call__(self, states: TowerStates, keeps: Sequence[int]) -> Reduced:
        """Reduce images to `keeps` tokens each, 1 or more and no more than an image has."""

    @abstractmethod
    def flops(self, shape: TowerShape, keep: int) -> int:
        """Multiply-adds that it adds to the tower of one picture."""


Choose = Callable[[Tensor, Tensor, int], Tensor]
"""From hidden states `[S, D]` of one image, attention of its patches and a number to keep, to
indices among the tower's tokens, in which 0 is the class token and patch p is p + 1."""


def chosen_one_by_one(states: TowerStates, keeps: Sequence[int], choose: Choose) -> Reduced:
    """Tokens as they are, chosen from one image at a time, in its order. What is no part of an
    image is not there to be chosen."""
    tokens, sources = [], []
    for number, keep in enumerate(keeps):
        hidden_SD, attention_N = states.hidden_ISD[number], states.attention_IP[number]
        patch_N = torch.arange(len(attention_N), device=attention_N.device)
        if states.valid_IP is not None:
            patch_N = patch_N[states.valid_IP[number]]
        own_SD = torch.cat((hidden_SD[:1], hidden_SD[1 + patch_N]))
        order_K = choose(own_SD, attention_N[patch_N], keep).sort().values
        tokens.append(own_SD[order_K])
        sources.append(F.pad(patch_N, (1, 0), value=CLASS_TOKEN)[order_K])
    return Reduced(torch.cat(tokens), torch.cat(sources), tuple(keeps))


def reduction(name: str) -> Reduction:
    """The reduction of a name in `trio.pruning.options.ENCODERS`, from the file of that name."""
    own: type[Reduction]
    own, _ = class_named("trio.encoders", name)
    return own()
