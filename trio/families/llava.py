"""LLaVA-1.5: a CLIP-like vision tower that sees each image once, at one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.families.adapter import Inputs, Layout
from trio.families.class_token_tower import ClassTokenAdapter
from trio.families.coordinates import OUTSIDE, raster
from trio.families.llava_vision import patches_per_edge, tokens_per_tile


class LlavaAdapter(ClassTokenAdapter):
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

    def coordinates(self, inputs: Inputs) -> list[Tensor]:
        edge = patches_per_edge(self.model.config)
        class_tokens = self.max_visual_tokens - edge**2
        own = F.pad(raster(edge, edge, 1.0), (0, 0, class_tokens, 0), value=OUTSIDE)
        return [own] * len(self.tiles(inputs))

    def layouts(self, inputs: Inputs) -> list[Layout]:
        edge = patches_per_edge(self.model.config)
        class_tokens = self.max_visual_tokens - edge**2
        places = torch.cat((torch.full((class_tokens,), -1), torch.arange(edge**2)))
        return [Layout(((edge, edge),), places)] * len(self.tiles(inputs))

    def _laid_out(self, tiles_QPD: Tensor, inputs: Sequence[Inputs]) -> Sequence[Tensor]:
        return tiles_QPD.unbind()

    def _places(self, inputs: Inputs) -> Tensor:
        patches = patches_per_edge(self.model.config) ** 2
        return torch.arange(patches)[None] + int(self._with_class)
