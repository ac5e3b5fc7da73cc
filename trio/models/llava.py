"""LLaVA-1.5: a CLIP-like vision tower, a projector and a text decoder of transformers.

Shapes: I images, N visual tokens of one image, D hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trio.errors import UserError
from trio.models.decoder import Decoder
from trio.pruning.cost import DecoderShape, VisionShape

_TEXT_MODELS = ("llama", "mistral", "qwen2")


class LlavaAdapter:
    """What engine and patch need of a `LlavaForConditionalGeneration`; changes nothing of it."""

    default_position_ids = "renumber"

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
        self.visual_tokens = _visual_tokens(model.config)
        """Of one image."""

    def encode_images(self, pixel_values: Tensor) -> list[Tensor]:
        """Visual features, all images in one pass of the tower.

        Args:
            pixel_values: `[I, 3, height, width]`, as the processor gives them.

        Returns:
            For each image `[N, D]` in the decoder's dtype and on its device.
        """
        parameter = next(self.model.model.vision_tower.parameters())
        pixel_values = pixel_values.to(parameter.device, parameter.dtype)
        with torch.no_grad():
            features = self.model.model.get_image_features(
                pixel_values,
                vision_feature_layer=self.model.config.vision_feature_layer,
                vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
        return [image.to(self.decoder.device, self.decoder.dtype) for image in features]

    def spans(
        self, input_ids: Sequence[int] | Tensor, features: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Where each image's placeholder tokens stand in a prompt.

        Args:
            input_ids: the prompt's tokens `[S]`, without padding.
            features: feature count of each of the prompt's images; None if every image gives
                `visual_tokens`. Placeholders of neighbouring images are told apart by it.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        tokens = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
        places = [i for i, token in enumerate(tokens) if token == self.image_token_id]
        if features is None:
            features = [self.visual_tokens] * (len(places) // self.visual_tokens)
        if len(places) != sum(features):
            raise UserError(
                f"prompt has {len(places)} image placeholder tokens but its {len(features)} images "
                f"give {sum(features)} features ({self.visual_tokens} is this model's usual number "
                "of an image); use the model's own processor, and one <image> per image"
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

    def vision_flops(self, images: int) -> int:
        """FLOPs of tower and projector for this many images."""
        return images * VisionShape.of_llava_config(self.model.config).flops()


def _visual_tokens(config: Any) -> int:
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "full":
        return patches + 1
    return patches
