"""LLaVA-NeXT (LLaVA-1.6): an image is seen whole and, at a higher resolution, in tiles.

The tiles' features are laid out as the image is, without those of its padding, and each row of
them ends in a newline feature; so the number of visual tokens varies with the image's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from trio.models.adapter import Inputs, tensor_of
from trio.models.tiles import TiledAdapter, patches_per_edge, tokens_per_tile
from trio.pruning.schedule import LLAVA_NEXT


class LlavaNextAdapter(TiledAdapter):
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
        grids = map(self._grid, _sizes(inputs))
        return [1 + rows * columns for rows, columns in grids]

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        return list(map(self._tokens, _sizes(inputs)))

    def _tile_dimensions(self, inputs: Inputs) -> list[int]:
        return self.tiles(inputs)

    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        return self.model.model.get_image_features(
            self._to_tower(torch.cat([image["pixel_values"][0] for image in inputs])),
            torch.cat([image["image_sizes"] for image in inputs]),
            **settings,
        ).pooler_output

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of this height and width."""
        config = self.model.config
        return get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )

    def _tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of this height and width."""
        rows, columns = self._grid(size)
        edge = patches_per_edge(self.model.config)
        padded = torch.empty(1, rows * edge, columns * edge, device="meta")
        _, height, width = unpad_image(padded, size).shape
        return tokens_per_tile(self.model.config) + height * (width + 1)


def _sizes(inputs: Inputs) -> list[tuple[int, int]]:
    """Height and width of each image."""
    return [(height, width) for height, width in tensor_of(inputs, "image_sizes").tolist()]
