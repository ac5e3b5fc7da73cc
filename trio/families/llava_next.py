"""LLaVA-NeXT (LLaVA-1.6): any resolution, each image cut into tiles.

Shapes: I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image

from trio.decoder.gpu import sent
from trio.encoders.reduction import reduction
from trio.families.adapter import Features, Inputs, Join, Layout
from trio.families.class_token_tower import ClassTokenAdapter
from trio.families.llava_vision import (
    AnyResolutionAdapter,
    image_sizes,
    patches_per_edge,
    tokens_per_tile,
)
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

    def boxes(self, inputs: Inputs) -> list[Tensor]:
        return [self._boxes(size, *self._layout(size)) for size in image_sizes(inputs)]

    def layouts(self, inputs: Inputs) -> list[Layout]:
        return [self._whole_and_tiles(*self._layout(size)) for size in image_sizes(inputs)]

    def _laid_out(self, tiles_QPD: Tensor, inputs: Sequence[Inputs]) -> Sequence[Tensor]:
        """One index for all images, made on the host, instead of the model's steps for each."""
        newline_1D = self.model.model.image_newline[None].to(tiles_QPD)
        tokens_XD = torch.cat((tiles_QPD.flatten(0, 1), newline_1D))
        patches = [self._patches(image) for image in inputs]
        tiles = [self.tiles(image)[0] for image in inputs]
        starts = (first * tiles_QPD.shape[1] for first in accumulate(tiles, initial=0))
        index_T = torch.cat(
            [
                torch.where(patch_N < 0, len(tokens_XD) - 1, patch_N + start)
                for start, patch_N in zip(starts, patches, strict=False)
            ]
        )
        packed_TD = tokens_XD.index_select(0, sent(index_T, tokens_XD.device))
        return packed_TD.split([len(patch_N) for patch_N in patches])

    def _patches(self, inputs: Inputs) -> Tensor:
        (size,), edge = image_sizes(inputs), patches_per_edge(self.model.config)
        rows, columns = self._grid(size)
        # Tile after tile, behind the picture as a whole; laid out as the image is.
        number = edge**2 + torch.arange(rows * columns * edge**2)
        number = number.view(rows, columns, edge, edge).transpose(1, 2)
        (in_image,) = unpad_image(number.reshape(1, rows * edge, columns * edge), size)
        return torch.cat((torch.arange(edge**2), F.pad(in_image, (0, 1), value=-1).flatten()))

    def _places(self, inputs: Inputs) -> Tensor:
        (tiles,), patches = self.tiles(inputs), patches_per_edge(self.model.config) ** 2
        patch_N = self._patches(inputs)
        # One more for the newlines, whose number is that of the last.
        place = torch.full((tiles * patches + 1,), -1)
        place[patch_N] = torch.arange(len(patch_N))
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
