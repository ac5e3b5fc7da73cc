"""LLaVA-1.5: a CLIP-like vision tower that sees each image once, at one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trio.models.adapter import Inputs
from trio.models.tiles import TiledAdapter, tokens_per_tile


class LlavaAdapter(TiledAdapter):
    """Of a `LlavaForConditionalGeneration`: `pixel_values [I, 3, height, width]`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        side = model.config.vision_config.image_size
        self.largest_image = (side, side)
        self.max_visual_tokens = tokens_per_tile(model.config)

    def tiles(self, inputs: Inputs) -> list[int]:
        return [1] * len(inputs["pixel_values"])

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        return [self.max_visual_tokens] * len(inputs["pixel_values"])

    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        pixels = torch.cat([image["pixel_values"] for image in inputs])
        return self.model.model.get_image_features(self._to_tower(pixels), **settings).pooler_output
