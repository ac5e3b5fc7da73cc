"""LLaVA-NeXT (LLaVA-1.6): any resolution, each image cut into tiles.

Shapes: I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trio.models.adapter import Inputs
from trio.models.tiles import AnyResolutionAdapter, image_sizes, tokens_per_tile
from trio.pruning.schedule import LLAVA_NEXT


class LlavaNextAdapter(AnyResolutionAdapter):
    """Of a `LlavaNextForConditionalGeneration`.

    It takes `pixel_values [I, tiles, 3, height, width]`, where images of fewer tiles are filled
    up, and `image_sizes [I, 2]`, heights and widths before any resizing.
    """

    schedule_shape = LLAVA_NEXT

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # An image with the shape of a grid has no padding to lose.
        sizes = [(height, width) for height, width in model.config.image_grid_pinpoints]
        height, width = max(sizes, key=self._tokens)
        self.largest_image = (width, height)
        self.max_visual_tokens = self._tokens((height, width))

    def tiles(self, inputs: Inputs) -> list[int]:
        grids = map(self._grid, image_sizes(inputs))
        return [1 + rows * columns for rows, columns in grids]

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        return list(map(self._tokens, image_sizes(inputs)))

    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        return self.model.model.get_image_features(
            self._to_tower(torch.cat([image["pixel_values"][0] for image in inputs])),
            torch.cat([image["image_sizes"] for image in inputs]),
            **settings,
        ).pooler_output

    def _tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of this height and width."""
        rows, columns = self._layout(size)
        return tokens_per_tile(self.model.config) + rows * (columns + 1)
