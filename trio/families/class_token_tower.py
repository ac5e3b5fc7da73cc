"""Reductions in towers with a class token, for models that cut images into tiles or do not.

Shapes: Q tiles, P patches of each, D hidden size of the tower, J size of the space that it shares
with its text tower, T tokens that are left, N visual tokens that an image has without a reduction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trio.encoders.clip_hooks import watched
from trio.encoders.merging import shared
from trio.encoders.reduction import CLASS_TOKEN, Reduced, TowerStates, reduction
from trio.families.adapter import Features, Inputs, Join, Joint
from trio.families.llava_vision import (
    CLASS_TOKENS,
    TiledAdapter,
    VisionShape,
    feature_layers,
    patches_per_edge,
)
from trio.pruning.options import ENCODERS


class ClassTokenAdapter(TiledAdapter):
    """Of a model with reductions in its tower, if that has a class token.

    Attention, keys and hidden states are those of the layer whose output the model takes as
    features: of published models the second-last, as VisionZip has it. VisionZip's class token
    becomes a visual token also where the model drops it, as in the published code. Where the model
    has it among its own (`vision_feature_select_strategy` "full"), it is their first, and the scan
    keeps it.

    Tiles share an image's budget by the patches that each has without padding, and are reduced
    each by itself. An image that keeps all is left as it is.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._feature_layers = feature_layers(model.config)
        tower = model.config.vision_config.model_type
        if CLASS_TOKENS[tower] > 0 and min(self._feature_layers) >= 0:
            self.encoders = tuple(name for name in ENCODERS if name != "none")
        # A text tower's joint space is made for the width of one layer.
        if tower == "clip_vision_model" and self.encoders and len(self._feature_layers) == 1:
            self.clip_tower = model.model.vision_tower

    @abstractmethod
    def _places(self, inputs: Inputs) -> Tensor:
        """Which visual token of an image each patch of its tiles becomes without a reduction,
        `[Q, P]` on the CPU; -1 for padding."""

    def reduced_flops(self, inputs: Inputs, encoder: str, keep: int) -> int:
        if keep == self.visual_tokens(inputs)[0]:
            return self.vision_flops(inputs)
        shape = VisionShape.of_llava_config(self.model.config)
        own = reduction(encoder)
        shares = filter(None, shared(keep, _patch_counts(self._places(inputs))))
        return sum(shape.flops(projected=share) + own.flops(shape.tower, share) for share in shares)

    def _reduced(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int], join: Join | None
    ) -> Sequence[Features]:
        counts = [self.visual_tokens(image)[0] for image in inputs]
        if encoder == "none":
            return self._whole(inputs, join)
        whole = [index for index, keep in enumerate(keeps) if keep == counts[index]]
        parts = [index for index, keep in enumerate(keeps) if keep < counts[index]]
        found: dict[int, Features] = {}
        if whole:
            unreduced = self._whole([inputs[index] for index in whole], join)
            for index, image in zip(whole, unreduced, strict=True):
                found[index] = replace(image, sources=tuple(range(len(image))))
        if parts:
            own, left = [inputs[index] for index in parts], [keeps[index] for index in parts]
            found |= zip(parts, self._of_patches(own, encoder, left, join), strict=True)
        return [found[index] for index in range(len(inputs))]

    def _whole(self, inputs: Sequence[Inputs], join: Join | None) -> list[Features]:
        """Unreduced features, in the joint space too if asked for."""
        hidden_QSD = self._selected(inputs)
        features = self._projected(hidden_QSD, inputs)
        if join is None:
            return features
        edge = patches_per_edge(self.model.config)
        patches_QPD = hidden_QSD[:, hidden_QSD.shape[1] - edge**2 :]
        tiles = [self.tiles(image)[0] for image in inputs]
        tokens_QPJ = join(patches_QPD).split(tiles)
        joints = (
            Joint(own.flatten(0, 1), ((edge, edge),) * len(own), self._patches(image))
            for own, image in zip(tokens_QPJ, inputs, strict=True)
        )
        return [replace(own, joint=joint) for own, joint in zip(features, joints, strict=True)]

    def _patches(self, inputs: Inputs) -> Tensor:
        """The other way round than `_places`: for each visual token of an image its patch, counted
        tile by tile, `[N]` on the CPU; -1 for newlines and a class token."""
        place_P = self._places(inputs).flatten()
        is_there_P = place_P >= 0
        patch_N = torch.full((self.visual_tokens(inputs)[0],), -1)
        patch_N[place_P[is_there_P]] = is_there_P.nonzero()[:, 0]
        return patch_N

    def _of_patches(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int], join: Join | None
    ) -> list[Features]:
        """Reduced features, tile after tile, of images that keep less than all; at most as many of
        an image as it has patches."""
        places = [self._places(image) for image in inputs]
        shares = [
            shared(keep, _patch_counts(own_QP)) for keep, own_QP in zip(keeps, places, strict=True)
        ]
        share_Q = torch.tensor([*chain.from_iterable(shares)])
        used_Q = share_Q > 0
        place_QP = torch.cat(places)[used_Q]
        reduced = self._reduce_tiles(
            self._pixels(inputs)[used_Q], place_QP >= 0, encoder, share_Q[used_Q].tolist()
        )
        lengths = [sum(own) for own in shares]
        tokens = self.model.model.multi_modal_projector(reduced.tokens_TD).split(lengths)
        sources = iter(self._sources(reduced, place_QP))
        features = [
            Features(own_ND, sources=tuple(next(sources) for _ in own_ND)) for own_ND in tokens
        ]
        if join is None:
            return features
        joined = join(reduced.tokens_TD).split(lengths)
        return [
            replace(image, joint=Joint(own_NJ, None, torch.arange(len(own_NJ))))
            for image, own_NJ in zip(features, joined, strict=True)
        ]

    def _reduce_tiles(
        self, pixels: Tensor, valid_QP: Tensor, encoder: str, keeps: Sequence[int]
    ) -> Reduced:
        """One pass of the tower, and what is left of each tile."""
        config, tower = self.model.config, self.model.model.vision_tower
        deep = max(self._feature_layers)
        # The sixth of 24 layers in the published code.
        shallow = min(deep, 5 * config.vision_config.num_hidden_layers // 24)
        with watched(tower, {deep, shallow}) as seen:
            hidden_QSD = self._states(pixels)
        valid = None if bool(valid_QP.all()) else valid_QP.to(hidden_QSD.device)
        states = TowerStates(
            hidden_ISD=hidden_QSD,
            deep=seen[deep],
            shallow=seen[shallow],
            columns=patches_per_edge(config),
            with_class=self._with_class,
            valid_IP=valid,
        )
        return reduction(encoder)(states, keeps)

    def _sources(self, reduced: Reduced, place_QP: Tensor) -> list[int | None]:
        """`Features.sources` of all tokens that are left."""
        patch_T = reduced.sources_T.cpu()
        tile_T = torch.arange(len(place_QP)).repeat_interleave(torch.tensor(reduced.lengths))
        place_T = place_QP[tile_T, patch_T.clamp(min=0)].tolist()
        first = 0 if self._with_class else None
        return [
            first if patch == CLASS_TOKEN else place
            for patch, place in zip(patch_T.tolist(), place_T, strict=True)
        ]

    @property
    def _with_class(self) -> bool:
        """Whether the class token is one of the model's own features."""
        return self.model.config.vision_feature_select_strategy == "full"


def _patch_counts(place_QP: Tensor) -> list[int]:
    """Patches of each tile, without padding."""
    return [int(count) for count in (place_QP >= 0).sum(dim=1)]
