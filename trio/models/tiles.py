"""What the LLaVA families share: a CLIP-like tower that takes pictures of one size.

Shapes: I images, N visual tokens of one image, D hidden size of the decoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trio.errors import UserError
from trio.models.adapter import Adapter, Features, Inputs, check_pixels
from trio.pruning.cost import CLASS_TOKENS, VisionShape


class TiledAdapter(Adapter):
    """Of a model that sees an image in one or several *tiles*, pictures as its tower takes them."""

    text_models = ("llama", "mistral", "qwen2")

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


def patches_per_edge(config: Any) -> int:
    """Of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tokens_per_tile(config: Any) -> int:
    """Features that the projector makes of one tile."""
    return VisionShape.of_llava_config(config).features
