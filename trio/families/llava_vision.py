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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from trio.encoders.reduction import TowerShape
from trio.errors import UserError
from trio.families.adapter import Adapter, Features, Inputs, Layout, check_pixels, tensor_of
from trio.families.coordinates import raster

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Towers that take pictures of one size, and the tokens that they add to a picture's patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of a CLIP-like tower and a two-layer projector, for one picture that it takes."""

    layers_run: int
    """Tower layers."""
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
    pooled: bool = False
    """Whether the tower also sums a picture up in one vector, by a query with attention and an FFN,
    though nobody uses it."""

    @classmethod
    def of_llava_config(cls, config: Any) -> VisionShape:
        """From a LlavaConfig, a LlavaNextConfig or a LlavaOnevisionConfig."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + CLASS_TOKENS[vision.model_type]
        # Where there is no class token, that strategy drops a patch.
        dropped = config.vision_feature_select_strategy == "default"
        return cls(
            layers_run=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            patches=patches,
            tokens=tokens,
            features=tokens - dropped,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            decoder_hidden_size=config.text_config.hidden_size,
            pooled=getattr(vision, "vision_use_head", False),
        )

    def flops(self, projected: int | None = None) -> int:
        """Tower and projector; without what a reduction itself costs.

        `projected`: tokens that a reduction leaves the projector; None if there is none. The tower
        runs as a whole in any case.
        """
        n, d, m = self.tokens, self.hidden_size, self.intermediate_size
        tower = self.layers_run * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
        if self.pooled:
            tower += 2 * d * (d + n * d + n + m)
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
    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        """The model's features of images `[1, ...]` each, in one pass of the tower."""

    def check_inputs(self, inputs: Inputs) -> None:
        side = self.model.config.vision_config.image_size
        check_pixels(inputs, [1, *self._tile_dimensions(inputs), 3, side, side])

    def vision_flops(self, inputs: Inputs) -> int:
        return sum(self.tiles(inputs)) * VisionShape.of_llava_config(self.model.config).flops()

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        config = self.model.config
        pooled = self._pool(
            inputs,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )
        return [Features(image) for image in pooled]

    def _to_tower(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.model.vision_tower.parameters())
        return pixels.to(parameter.device, parameter.dtype)


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


def patches_per_edge(config: Any) -> int:
    """Of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tokens_per_tile(config: Any) -> int:
    """Features that the projector makes of one tile."""
    return VisionShape.of_llava_config(config).features
