"""LLaVA-NeXT (LLaVA-1.6): any resolution, each image cut into tiles.

Shapes: I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.encoders.reduction import reduction
from trio.families.adapter import Features, Inputs, Join, Layout
from trio.families.anyres import (
    AnyResolutionAdapter,
    image_sizes,
    patches_per_edge,
    tokens_per_tile,
)
from trio.families.class_token_tower import ClassTokenAdapter
from trio.pruning.schedule import LLAVA_NEXT


class LlavaNextAdapter(ClassTokenAdapter, AnyResolutionAdapter):
    """Of a `LlavaNextForConditionalGeneration`.

    It takes `pixel_values [I, tiles, 3, height, width]`, where images of fewer tiles are filled
    up, and `image_sizes [I, 2]`, heights and widths before any resizing.

    Of an image that is reduced in the tower no newline features are left, unless it is to keep more
    tokens than it has patches. After VisionZip the tokens stand tile by tile, each tile's in the
    published order; after the scan as they do without a reduction.
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

    def coordinates(self, inputs: Inputs) -> list[Tensor]:
        sizes = image_sizes(inputs)
        return [self._coordinates(size, *self._layout(size)) for size in sizes]

    def layouts(self, inputs: Inputs) -> list[Layout]:
        return [self._whole_and_tiles(*self._layout(size)) for size in image_sizes(inputs)]

    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        return self.model.model.get_image_features(
            self._to_tower(self._pixels(inputs)),
            torch.cat([image["image_sizes"] for image in inputs]),
            **settings,
        ).pooler_output

    def _pixels(self, inputs: Sequence[Inputs]) -> Tensor:
        return torch.cat([image["pixel_values"][0] for image in inputs])

    def _places(self, inputs: Inputs) -> Tensor:
        (tiles,), patches = self.tiles(inputs), patches_per_edge(self.model.config) ** 2
        number_QP1 = torch.arange(tiles * patches).view(tiles, patches, 1)
        # The model lays the patches' numbers out as it does their features; a newline's is -1.
        (laid_out_N1,), _ = self.model.model.pack_image_features(
            [number_QP1],
            inputs["image_sizes"],
            self.model.config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1]),
        )
        # One more for the newlines, whose number is that of the last.
        place = torch.full((tiles * patches + 1,), -1)
        place[laid_out_N1[:, 0]] = torch.arange(len(laid_out_N1))
        return place[:-1].view(tiles, patches)

    def _of_patches(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int], join: Join | None
    ) -> list[Features]:
        reduced = super()._of_patches(inputs, encoder, keeps, join)
        filled = [self._with_newlines(*image) for image in zip(inputs, reduced, keeps, strict=True)]
        return list(map(_in_order, filled)) if reduction(encoder).in_image_order else filled

    def _with_newlines(self, inputs: Inputs, image: Features, keep: int) -> Features:
        """The image's features, and its first newlines behind them if there are to be more."""
        missing = keep - len(image)
        if not missing:
            return image
        places = {*self._places(inputs).flatten().tolist()}
        (count,) = self.visual_tokens(inputs)
        newlines = [place for place in range(count) if place not in places][:missing]
        newline_D: Tensor = self.model.model.image_newline.to(image.tokens)
        tokens = torch.cat((image.tokens, newline_D.expand(missing, -1)))
        joint = image.joint
        if joint is not None:
            joint = replace(joint, places=F.pad(joint.places, (0, missing), value=-1))
        return Features(tokens, sources=(*image.sources, *newlines), joint=joint)

    def _tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of this height and width."""
        rows, columns = self._layout(size)
        return tokens_per_tile(self.model.config) + rows * (columns + 1)


def _in_order(image: Features) -> Features:
    """Sorted by source; of an image without the class token."""
    order = torch.tensor(image.sources).argsort()
    sources = tuple(torch.tensor(image.sources)[order].tolist())
    joint = image.joint
    if joint is not None:
        joint = replace(joint, places=joint.places[order])
    return Features(image.tokens[order], sources=sources, joint=joint)
