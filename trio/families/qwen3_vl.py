"""Qwen3-VL: the decoder gets more of an image behind each of its first layers (DeepStack,
arXiv 2406.04334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLProcessor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from trio.families.adapter import Features, ImageOnly, Inputs
from trio.families.qwen_vision import GridAdapter, GridVisionShape


class ImageProcessor(ImageOnly, Qwen3VLProcessor):
    """The model's processor for images."""


class Qwen3VLAdapter(GridAdapter):
    """Of a `Qwen3VLForConditionalGeneration`."""

    text_models = ("qwen3_vl_text",)
    encoders = ("scan",)
    processor_class = ImageProcessor

    def _vision_shape(self) -> GridVisionShape:
        return GridVisionShape.of_qwen3_config(self.model.config.vision_config)

    def _scanned(self) -> tuple[int, int]:
        # Nothing is published. All blocks attend to the whole image; this one is as deep as the
        # shallow ones of LLaVA-1.5 (5 of 24) and Qwen2.5-VL (7 of 32).
        depth = self.model.config.vision_config.depth
        return max(0, depth // 4 - 1), depth - 1

    def _places(self, grids: Tensor) -> dict[str, Tensor | int]:
        tower = self.model.model.visual
        index, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self._merge,
        )
        return super()._places(grids) | {"interp_indices": index, "interp_weights": weights}

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        out = self._encode(inputs)
        counts = [len(tokens) for tokens in out.pooler_output]
        # In transformers 5.17 all images of a layer come in one tensor.
        layers = [
            (layer if isinstance(layer, Tensor) else torch.cat(layer)).split(counts)
            for layer in out.deepstack_features or ()
        ]
        return [
            Features(tokens, tuple(layer[number] for layer in layers))
            for number, tokens in enumerate(out.pooler_output)
        ]

    def injected(self, call: Mapping[str, Any]) -> Sequence[Tensor]:
        return call.get("deepstack_visual_embeds") or ()
