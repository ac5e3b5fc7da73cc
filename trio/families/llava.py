"""LLaVA-1.5: a CLIP-like vision tower that sees each image once, at one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.families.adapter import Inputs, Layout
from trio.families.class_token_tower import ClassTokenAdapter
from trio.families.coordinates import (
    OUTSIDE,
    Frame,
    edges,
    grid_boxes,
    raster,
    square_frame,
)
from trio.families.llava_vision import patch_share, patches_per_edge, tokens_per_tile


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

    @staticmethod
    def frame(processor: Any, size: tuple[int, int]) -> Frame | None:
        return _frame(processor.image_processor, *size)

    def boxes(self, inputs: Inputs) -> list[Tensor]:
        edge = patches_per_edge(self.model.config)
        class_tokens = self.max_visual_tokens - edge**2
        along = edges(edge, patch_share(self.model.config))
        own = F.pad(grid_boxes(along, along), (0, 0, class_tokens, 0), value=nan)
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


def _frame(images: Any, width: int, height: int) -> Frame | None:
    """What an image processor makes its picture of: the image, padded to a square or not, resized,
    and its middle cut out."""
    left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
    across, down = width, height
    if getattr(images, "do_pad", None):
        if not hasattr(images, "pad_to_square"):
            return None
        left, top, right, bottom = square_frame(width, height)
        across = down = max(width, height)
    if images.do_resize:
        resized = _resized(images.size, across, down)
        if resized is None:
            return None
        across, down = resized
    if getattr(images, "do_center_crop", None):
        # Of a picture that is smaller than what is cut out, padding is cut out too.
        crop_across, crop_down = images.crop_size["width"], images.crop_size["height"]
        x, y = (across - crop_across) // 2, (down - crop_down) // 2
        pixel_across, pixel_down = (right - left) / across, (bottom - top) / down
        left, top = left + x * pixel_across, top + y * pixel_down
        right, bottom = left + crop_across * pixel_across, top + crop_down * pixel_down
    return left, top, right, bottom


def _resized(size: Mapping[str, int], width: int, height: int) -> tuple[int, int] | None:
    """Width and height after a processor's resizing; None where its `size` is of another kind."""
    if size.get("longest_edge") or size.get("max_height"):
        return None
    if shortest := size.get("shortest_edge"):
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest
    return size["width"], size["height"]
