"""What the LLaVA families share: a CLIP-like tower that takes pictures of one size.

Shapes: I images, N visual tokens of one image, D hidden size of the decoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trio.models.adapter import Adapter, Inputs, check_pixels
from trio.pruning.cost import VisionShape


class TiledAdapter(Adapter):
    """Of a model that sees an image in one or several *tiles*, pictures as its tower takes them."""

    text_models = ("llama", "mistral", "qwen2")

    @abstractmethod
    def tiles(self, inputs: Inputs) -> list[int]:
        """Tiles of each image."""

    @abstractmethod
    def _tile_dimensions(self, inputs: Inputs) -> list[int]:
        """Of one image's `pixel_values`, between those of images and of colours."""

    @abstractmethod
    def _pool(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        """The model's features of images `[1, ...]` each, in one pass of the tower."""

    def check_inputs(self, inputs: Inputs) -> None:
        side = self.model.config.vision_config.image_size
        check_pixels(inputs, [1, *self._tile_dimensions(inputs), 3, side, side])

    def vision_flops(self, inputs: Inputs) -> int:
        return sum(self.tiles(inputs)) * VisionShape.of_llava_config(self.model.config).flops()

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Tensor]:
        config = self.model.config
        return self._pool(
            inputs,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )

    def _to_tower(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.model.vision_tower.parameters())
        return pixels.to(parameter.device, parameter.dtype)


def patches_per_edge(config: Any) -> int:
    """Of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tokens_per_tile(config: Any) -> int:
    """Features that the projector makes of one tile."""
    class_token = config.vision_feature_select_strategy == "full"
    return patches_per_edge(config) ** 2 + class_token
