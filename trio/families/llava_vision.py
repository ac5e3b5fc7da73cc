"""What the LLaVA families share: a CLIP-like tower that takes pictures of one size.

With *any resolution* an image is seen whole and, larger, in a grid of tiles. The tiles' features
are laid out as the image is, without those of its padding, and each row of them ends in a newline
feature; so the number of visual tokens varies with the image's shape.

Shapes: I images, N visual tokens of one image, D hidden size of the decoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from trio.decoder.gpu import sent
from trio.encoders.clip_hooks import hidden_states
from trio.encoders.reduction import TowerShape
from trio.errors import UserError
from trio.families.adapter import Adapter, Features, Inputs, Layout, check_pixels, tensor_of
from trio.families.coordinates import Edges, edges, grid_boxes, raster

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Towers that take pictures of one size, and the tokens that they add to a picture's patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of a CLIP-like tower and a two-layer projector, for one picture that it takes."""

    layers_run: int
    """Tower layers, up to the deepest whose output is taken: no others are run."""
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patches: int
    tokens: int
    """Patches and the class token, if there is one."""
    features: int
    """Tokens that the projector gets."""
    patch_inputs: int
    decoder_hidden_size: int

    @classmethod
    def of_llava_config(cls, config: Any) -> VisionShape:
        """From a LlavaConfig, a LlavaNextConfig or a LlavaOnevisionConfig."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + CLASS_TOKENS[vision.model_type]
        # Where there is no class token, that strategy drops a patch.
        dropped = config.vision_feature_select_strategy == "default"
        return cls(
            layers_run=max(feature_layers(config)) + 1,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            patches=patches,
            tokens=tokens,
            features=tokens - dropped,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            decoder_hidden_size=config.text_config.hidden_size,
        )

    def flops(self, projected: int | None = None) -> int:
        """Tower and projector; without what a reduction itself costs.

        `projected`: tokens that a reduction leaves the projector; None if there is none. The tower
        runs alike in any case.
        """
        n, d, m = self.tokens, self.hidden_size, self.intermediate_size
        tower = self.layers_run * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
        patches = self.patches * self.patch_inputs * d
        out = self.decoder_hidden_size
        projected = self.features if projected is None else projected
        return tower + patches + projected * (d * out + out * out)

    @property
    def tower(self) -> TowerShape:
        """For what a reduction in it costs."""
        return TowerShape(
            patches=self.patches,
            tokens=self.tokens,
            hidden_size=self.hidden_size,
            head_dim=self.hidden_size // self.num_heads,
        )


class TiledAdapter(Adapter):
    """Of a model that sees an image in one or several *tiles*, pictures as its tower takes them."""

    text_models: tuple[str, ...] = ("llama", "mistral", "qwen2")

    def __init__(self, model: Any) -> None:
        tower = model.config.vision_config.model_type
        if tower not in CLASS_TOKENS:
            raise UserError(
                f"{type(model).__name__} over a {tower!r} tower is not supported; supported are "
                f"{', '.join(CLASS_TOKENS)}"
            )
        super().__init__(model)

    @abstractmethod
    def tiles(self, inputs: Inputs) -> list[int]:
        """Tiles of each image."""

    def _tile_dimensions(self, inputs: Inputs) -> list[int]:
        """Of one image's `pixel_values`, between those of images and of colours; none where an
        image is one picture."""
        return []

    @abstractmethod
    def _laid_out(self, tiles_QPD: Tensor, inputs: Sequence[Inputs]) -> Sequence[Tensor]:
        """The model's features of images `[1, ...]` each, `[N, D]`, from what its projector made of
        their tiles, as far as there are P tokens of each of these Q."""

    def _pixels(self, inputs: Sequence[Inputs]) -> Tensor:
        """Tiles of images, `[Q, 3, height, width]`."""
        return torch.cat([image["pixel_values"] for image in inputs])

    def check_inputs(self, inputs: Inputs) -> None:
        side = self.model.config.vision_config.image_size
        check_pixels(inputs, [1, *self._tile_dimensions(inputs), 3, side, side])

    def vision_flops(self, inputs: Inputs) -> int:
        return sum(self.tiles(inputs)) * VisionShape.of_llava_config(self.model.config).flops()

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        return self._projected(self._selected(inputs), inputs)

    def _selected(self, inputs: Sequence[Inputs]) -> Tensor:
        """What the projector takes of all tiles, `[Q, P, D]`, D the hidden size of the tower times
        the layers that are taken."""
        hidden_QSD = self._states(self._pixels(inputs))
        return hidden_QSD[:, 1:] if self._drops_first else hidden_QSD

    def _projected(self, selected_QPD: Tensor, inputs: Sequence[Inputs]) -> list[Features]:
        tiles_QPD = self.model.model.multi_modal_projector(selected_QPD)
        return [Features(image) for image in self._laid_out(tiles_QPD, inputs)]

    def _states(self, pixels: Tensor) -> Tensor:
        """Hidden states of the tower that become features, `[Q, S, D]`, of layers side by side."""
        tower = self.model.model.vision_tower
        parameter = next(tower.parameters())
        pixels = sent(pixels, parameter.device, parameter.dtype)
        layers = hidden_states(tower, pixels, feature_layers(self.model.config))
        return layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)

    @property
    def _drops_first(self) -> bool:
        """Whether the tower's first token, of a CLIP its class token, is none of the features."""
        return self.model.config.vision_feature_select_strategy == "default"


class AnyResolutionAdapter(TiledAdapter):
    """Of a model whose config has `image_grid_pinpoints`: heights and widths that images are scaled
    into, the padding around them included, before they are cut into tiles."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        features, edge = tokens_per_tile(model.config), patches_per_edge(model.config)
        if features != edge**2:
            strategy = model.config.vision_feature_select_strategy
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} leaves {features} features of a tile "
                f"of {edge} x {edge} patches, which cannot be laid out"
            )
        side, sizes = model.config.vision_config.image_size, model.config.image_grid_pinpoints
        if not sizes or any(edge < 1 or edge % side for size in sizes for edge in size):
            raise UserError(
                f"image_grid_pinpoints {sizes} are no multiples of {side}, the pixels of a tile"
            )

    def _tile_dimensions(self, inputs: Inputs) -> list[int]:
        return self.tiles(inputs)

    def _pixels(self, inputs: Sequence[Inputs]) -> Tensor:
        return torch.cat([image["pixel_values"][0] for image in inputs])

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of this height and width."""
        config = self.model.config
        return get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )

    def _coordinates(self, size: tuple[int, int], rows: int, columns: int) -> Tensor:
        """`[N, 2]`, of an image of this height and width, seen whole and in tiles that have so many
        rows and columns of features."""
        edge, aspect = patches_per_edge(self.model.config), size[0] / size[1]
        whole = raster(edge, edge, aspect)
        return torch.cat((whole, raster(rows, columns, aspect, newlines=True)))

    def _boxes(self, size: tuple[int, int], rows: int, columns: int) -> Tensor:
        """As `boxes`, of an image of this height and width, seen whole and in tiles that have so
        many rows and columns of features: those without padding, or what they were shrunk to."""
        config = self.model.config
        side: int = config.vision_config.image_size
        along = edges(patches_per_edge(config), patch_share(config))
        grid = self._grid(size)
        # The image fills one edge of the grid.
        scale = min(tiles * side / length for tiles, length in zip(grid, size, strict=True))
        down, across = (
            self._tile_edges(count, unpadded, tiles, min(ceil(length * scale), tiles * side))
            for count, unpadded, tiles, length in zip(
                (rows, columns), self._layout(size), grid, size, strict=True
            )
        )
        return torch.cat((grid_boxes(along, along), grid_boxes(down, across, newlines=True)))

    def _tile_edges(self, count: int, unpadded: int, tiles: int, pixels: int) -> Edges:
        """Of features in tiles along an axis, in shares of the image.

        Args:
            count: features.
            unpadded: as many before they were shrunk.
            tiles: side by side.
            pixels: that the image has there, between padding on both sides.
        """
        vision, edge = self.model.config.vision_config, patches_per_edge(self.model.config)
        first = (tiles * edge - unpadded) // 2
        step = unpadded / max(1, count)
        bound = first + torch.arange(count + 1, dtype=torch.float64) * step
        # A tile may end in pixels that are no whole patch, which no feature shows.
        first_patch, last_patch = bound[:-1].floor(), bound[1:].ceil() - 1
        before = (tiles * vision.image_size - pixels) // 2

        def share(patch: Tensor, bound: Tensor) -> Tensor:
            start = patch // edge * vision.image_size + patch % edge * vision.patch_size
            return (start + (bound - patch) * vision.patch_size - before) / pixels

        return share(first_patch, bound[:-1]), share(last_patch, bound[1:])

    def _whole_and_tiles(self, rows: int, columns: int) -> Layout:
        """Of an image seen whole and in tiles that have so many rows and columns of features."""
        edge = patches_per_edge(self.model.config)
        rows_RC = edge**2 + torch.arange(rows * columns).view(rows, columns)
        in_tiles = F.pad(rows_RC, (0, 1), value=-1).flatten()
        places = torch.cat((torch.arange(edge**2), in_tiles))
        return Layout(((edge, edge), (rows, columns)), places)

    def _layout(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of features that the tiles of such an image have without padding."""
        rows, columns = self._grid(size)
        edge = patches_per_edge(self.model.config)
        padded = torch.empty(1, rows * edge, columns * edge, device="meta")
        _, height, width = unpad_image(padded, size).shape
        return height, width


def image_sizes(inputs: Inputs) -> list[tuple[int, int]]:
    """Height and width of each image, before any resizing."""
    return [(height, width) for height, width in tensor_of(inputs, "image_sizes").tolist()]


def feature_layers(config: Any) -> list[int]:
    """Tower layers, counted from 0, whose output becomes features; -1 for its embeddings."""
    chosen = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return [layer % states - 1 for layer in ([chosen] if isinstance(chosen, int) else chosen)]


def patches_per_edge(config: Any) -> int:
    """Of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def patch_share(config: Any) -> float:
    """A patch's edge over that of a tile, whose last pixels may be no whole patch."""
    return float(config.vision_config.patch_size / config.vision_config.image_size)


def tokens_per_tile(config: Any) -> int:
    """Features that the projector makes of one tile."""
    return VisionShape.of_llava_config(config).features
