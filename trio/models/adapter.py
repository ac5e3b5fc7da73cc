"""What engine and patch need of a vision-language model, whatever its family.

Shapes: I images, N visual tokens of one image, D hidden size of the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trio.errors import UserError
from trio.models.decoder import Decoder
from trio.pruning.cost import DecoderShape, VisionShape

_TEXT_MODELS = ("llama", "mistral", "qwen2")
Inputs = Mapping[str, Any]
"""What an image processor made of some images, as the model takes it: tensors `[I, ...]`."""


class Adapter(ABC):
    """A vision tower, a projector and a LLaMA-type decoder; changes nothing of the model.

    A *tile* is one picture as the tower takes it. An image is one of them or several.
    """

    default_position_ids = "renumber"
    largest_image: tuple[int, int]
    """Width and height, in pixels, of an image that gives as many visual tokens as any can."""
    max_visual_tokens: int
    """Visual tokens of that image."""

    def __init__(self, model: Any) -> None:
        text_config = model.config.text_config
        if text_config.model_type not in _TEXT_MODELS:
            raise UserError(
                f"LLaVA over a {text_config.model_type!r} text decoder is not supported; "
                f"supported are {', '.join(_TEXT_MODELS)}"
            )
        self.model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head)
        self.image_token_id: int = model.config.image_token_id

    @abstractmethod
    def tiles(self, inputs: Inputs) -> list[int]:
        """Tiles of each image."""

    @abstractmethod
    def visual_tokens(self, inputs: Inputs) -> list[int]:
        """Visual tokens that the model will make of each image, told without running it."""

    @abstractmethod
    def _tile_dimensions(self, inputs: Inputs) -> list[int]:
        """Of one image's `pixel_values`, between those of images and of colours."""

    @abstractmethod
    def _features(self, inputs: Sequence[Inputs], **settings: Any) -> Sequence[Tensor]:
        """The model's features of images `[1, ...]` each, in one pass of the tower."""

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise UserError unless the model can take these, of one image."""
        side = self.model.config.vision_config.image_size
        given = list(tensor_of(inputs, "pixel_values").shape)
        wanted = [1, *self._tile_dimensions(inputs), 3, side, side]
        if given != wanted:
            raise UserError(
                f"pixel_values of an image have shape {given}, and the model takes {wanted}; use "
                "the model's own processor"
            )

    def encode_images(self, inputs: Sequence[Inputs]) -> list[Tensor]:
        """Visual features, all images in one pass of the tower.

        Args:
            inputs: for each image what the processor made of it alone.

        Returns:
            For each image `[N, D]` in the decoder's dtype and on its device.
        """
        config = self.model.config
        with torch.no_grad():
            features = self._features(
                inputs,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                return_dict=True,
            )
        return [image.to(self.decoder.device, self.decoder.dtype) for image in features]

    def _to_tower(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.model.vision_tower.parameters())
        return pixels.to(parameter.device, parameter.dtype)

    def spans(
        self, input_ids: Sequence[int] | Tensor, features: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Where each image's placeholder tokens stand in a prompt.

        Args:
            input_ids: the prompt's tokens `[S]`, without padding.
            features: feature count of each of the prompt's images. Placeholders of neighbouring
                images are told apart by it.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        tokens = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
        places = [i for i, token in enumerate(tokens) if token == self.image_token_id]
        if len(places) != sum(features):
            raise UserError(
                f"prompt has {len(places)} image placeholder tokens but its {len(features)} images "
                f"give {sum(features)} features; use the model's own processor, and one <image> "
                "per image"
            )
        spans = []
        used = 0
        for count in features:
            start, last = places[used], places[used + count - 1]
            if last - start != count - 1:
                raise UserError(
                    f"the {count} placeholder tokens of an image at position {start} are not "
                    "side by side"
                )
            spans.append((start, last + 1))
            used += count
        return spans

    def embed(self, input_ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Decoder input of packed prompts.

        Args:
            input_ids: `[T]`, prompts back to back.
            features: visual features of all their images in order, `[N, D]` each.

        Returns:
            `[T, D]`: text embeddings, with features in the place of placeholders.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        input_ids = input_ids.to(self.decoder.device)
        is_image_T = input_ids == self.image_token_id
        count = sum(len(image) for image in features)
        placeholders = int(is_image_T.sum())
        if placeholders != count:
            raise UserError(
                f"prompts have {placeholders} image placeholder tokens but their images give "
                f"{count} features"
            )
        embeds_TD = self.decoder.embed(input_ids.masked_fill(is_image_T, 0))
        if not features:
            return embeds_TD
        packed = torch.cat(list(features)).to(embeds_TD)
        return embeds_TD.masked_scatter(is_image_T[:, None], packed)

    def shape(self) -> DecoderShape:
        """The decoder's size, for counting its cost."""
        return DecoderShape.of_config(self.model.config.text_config)

    def vision_flops(self, tiles: int) -> int:
        """FLOPs of tower and projector for this many tiles."""
        return tiles * VisionShape.of_llava_config(self.model.config).flops()


def tensor_of(inputs: Inputs, name: str) -> Tensor:
    """One of the tensors; a UserError if it is not there."""
    tensor = inputs.get(name)
    if tensor is None:
        raise UserError(
            f"images without {name}; pass on all that the model's own processor returns"
        )
    return tensor


def patches_per_edge(config: Any) -> int:
    """Of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tokens_per_tile(config: Any) -> int:
    """Features that the projector makes of one tile."""
    class_token = config.vision_feature_select_strategy == "full"
    return patches_per_edge(config) ** 2 + class_token
