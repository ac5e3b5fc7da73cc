"""LLaVA-OneVision: any resolution for an image that is alone in its prompt.

Several images of one prompt are each padded to a square and seen once. An image whose tiles have
more features than the config's `vision_aspect_ratio` allows gets them interpolated to fewer.

Shapes: I images, B prompts that have any, N visual tokens of one image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import ceil, nan, sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionProcessor

from trio.errors import UserError
from trio.families.adapter import ImageOnly, Inputs, Layout, tensor_of
from trio.families.coordinates import (
    OUTSIDE,
    edges,
    framed,
    grid_boxes,
    raster,
    square_frame,
)
from trio.families.llava_vision import (
    AnyResolutionAdapter,
    image_sizes,
    patch_share,
    patches_per_edge,
    tokens_per_tile,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_TOLERANCE = 1.1
"""Times as many features along an edge as allowed are still left as they are."""
_Size = tuple[int, int]
"""Height and width."""


class ImageProcessor(ImageOnly, LlavaOnevisionProcessor):
    """The model's processor for images."""


class LlavaOnevisionAdapter(AnyResolutionAdapter):
    """Of a `LlavaOnevisionForConditionalGeneration`.

    It takes `pixel_values [I, tiles, 3, height, width]`, where images of fewer tiles are filled
    up, `image_sizes [I, 2]`, heights and widths before any resizing, and `batch_num_images [B]`,
    images of each prompt. What is made of one image keeps the number of images in its prompt, by
    which the model too tells that it is not in tiles.
    """

    text_models = ("qwen2",)
    processor_class = ImageProcessor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.video_token_id = model.config.video_token_id
        self._max_features = _max_tiles(model.config) * patches_per_edge(model.config) ** 2
        found = sorted(self._extremes(), key=lambda extreme: self._count(extreme[0]), reverse=True)
        self.max_visual_tokens = self._count(found[0][0])
        # Some images of the list may not be put into the grid that they were thought up for.
        height, width = next(
            size for layout, size in found if self._tokens(size) == self._count(layout)
        )
        self.largest_image = (width, height)

    @staticmethod
    def process_images(processor: Any, images: Sequence[Image], **options: Any) -> list[Inputs]:
        if not images:
            return []
        made = processor(
            images=[list(images)],
            text=[processor.image_token * len(images)],
            add_special_tokens=False,
            return_tensors="pt",
            **options,
        )
        # All have as many placeholders. Copied, as a part of a tensor is pickled with all of it.
        names = ("pixel_values", "image_sizes")
        ids = made["input_ids"].chunk(len(images), dim=1)
        return [
            {
                "input_ids": ids[index],
                **{name: made[name][index, None].clone() for name in names},
                "batch_num_images": made["batch_num_images"],
            }
            for index in range(len(images))
        ]

    def tiles(self, inputs: Inputs) -> list[int]:
        return [self._tiles(size) if tiled else 1 for size, tiled in _images(inputs)]

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        untiled = tokens_per_tile(self.model.config) + 1
        return [self._tokens(size) if tiled else untiled for size, tiled in _images(inputs)]

    def coordinates(self, inputs: Inputs) -> list[Tensor]:
        edge = patches_per_edge(self.model.config)
        # Alone an image is seen as it is; beside others padded to a square, with one newline.
        padded = F.pad(raster(edge, edge, 1.0), (0, 0, 0, 1), value=OUTSIDE)
        return [
            self._coordinates(size, *self._shrunk(*self._layout(size))) if tiled else padded
            for size, tiled in _images(inputs)
        ]

    def boxes(self, inputs: Inputs) -> list[Tensor]:
        return [
            self._boxes(size, *self._shrunk(*self._layout(size)))
            if tiled
            else self._padded_boxes(size)
            for size, tiled in _images(inputs)
        ]

    def _padded_boxes(self, size: _Size) -> Tensor:
        """As `boxes`, of an image that is padded to a square and seen once."""
        height, width = size
        along = edges(patches_per_edge(self.model.config), patch_share(self.model.config))
        own = framed(grid_boxes(along, along), square_frame(width, height))
        return F.pad(own, (0, 0, 0, 1), value=nan)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        edge = patches_per_edge(self.model.config)
        padded = Layout(((edge, edge),), F.pad(torch.arange(edge**2), (0, 1), value=-1))
        return [
            self._whole_and_tiles(*self._shrunk(*self._layout(size))) if tiled else padded
            for size, tiled in _images(inputs)
        ]

    def video_tokens(self, inputs: Inputs) -> list[int]:
        videos, frames = tensor_of(inputs, "pixel_values_videos").shape[:2]
        edge = ceil(patches_per_edge(self.model.config) / 2)
        return [frames * edge**2 + 1] * videos  # 1 for the newline behind the last frame

    def _laid_out(self, tiles_QPD: Tensor, inputs: Sequence[Inputs]) -> Sequence[Tensor]:
        model = self.model.model
        counts = [self.tiles(image)[0] for image in inputs]
        features, _ = model.pack_image_features(
            tiles_QPD.split(counts),
            torch.cat([image["image_sizes"] for image in inputs]),
            image_newline=model.image_newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return features

    def _tiles(self, size: _Size) -> int:
        rows, columns = self._grid(size)
        return 1 + rows * columns

    def _tokens(self, size: _Size) -> int:
        """Visual tokens of an image in tiles."""
        return self._count(self._layout(size))

    def _count(self, layout: tuple[int, int]) -> int:
        """Visual tokens where the tiles have so many rows and columns of features."""
        rows, columns = self._shrunk(*layout)
        return tokens_per_tile(self.model.config) + rows * (columns + 1)

    def _shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        """What is left of so many rows and columns, where they are more than allowed."""
        excess = sqrt(rows * columns / self._max_features)
        if excess > _TOLERANCE:
            return int(rows // excess), int(columns // excess)
        return rows, columns

    def _extremes(self) -> Iterator[tuple[tuple[int, int], _Size]]:
        """Every layout that an image in tiles can have, and some that none has, each with an image
        that may have it.

        An image fills one edge of its grid, and loses an even number of rows or columns at the
        other. It does not lose so many that a shorter grid would have done: that would have been
        taken, as less is wasted in it.
        """
        pinpoints = [(height, width) for height, width in self.model.config.image_grid_pinpoints]
        edge = patches_per_edge(self.model.config)
        side: int = self.model.config.vision_config.image_size
        for height, width in pinpoints:
            rows, columns = height // side * edge, width // side * edge
            shorter = max((h for h, w in pinpoints if w == width and h < height), default=0)
            for left in range(rows, shorter // side * edge - 1, -2):
                yield (left, columns), (max(1, left * width // columns), width)
            shorter = max((w for h, w in pinpoints if h == height and w < width), default=0)
            for left in range(columns, shorter // side * edge - 1, -2):
                yield (rows, left), (height, max(1, left * height // rows))


def _max_tiles(config: Any) -> int:
    """Tiles whose features an image may have."""
    ratio = config.vision_aspect_ratio
    matched = re.fullmatch(r"anyres_max_([1-9][0-9]*)", ratio)
    if matched is None:
        raise UserError(
            f"vision_aspect_ratio {ratio!r} of the model's config is not supported; supported is "
            "anyres_max_N, with a number of tiles"
        )
    return int(matched[1])


def _images(inputs: Inputs) -> Iterator[tuple[_Size, bool]]:
    """Size of each image, and whether it is in tiles: they all are if the call does not say."""
    sizes = image_sizes(inputs)
    counts = inputs.get("batch_num_images")
    counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
    tiled = [count == 1 for count in counts for _ in range(count)]
    if len(tiled) < len(sizes):
        raise UserError(
            f"batch_num_images counts {len(tiled)} images, and there are {len(sizes)}; pass on all "
            "that the model's own processor returns"
        )
    return zip(sizes, tiled, strict=False)
