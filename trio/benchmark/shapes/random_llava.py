"""LLaVA-1.5 and LLaVA-NeXT with random weights, for measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from trio.demo.language import CHAT_TEMPLATE


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaShape:
    """Sizes of a LLaVA: a CLIP tower with a class token, a projector and a LLaMA decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    image: int
    patch: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Heights and widths to which images are resized before they are cut into tiles; not empty
    makes it a LLaVA-NeXT."""

    def model(self, words: PreTrainedTokenizerFast) -> Any:
        common: dict[str, Any] = {
            "vision_config": CLIPVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=4 * self.vision_hidden,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_heads,
                image_size=self.image,
                patch_size=self.patch,
                projection_dim=self.vision_hidden,
            ),
            "text_config": LlamaConfig(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                vocab_size=self.vocabulary,
                max_position_embeddings=4096,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
                tie_word_embeddings=False,
            ),
            "image_token_index": words.convert_tokens_to_ids("<image>"),
            "image_seq_length": (self.image // self.patch) ** 2,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
        }
        if self.pinpoints:
            config = LlavaNextConfig(**common, image_grid_pinpoints=self._lists())
            return LlavaNextForConditionalGeneration(config)
        return LlavaForConditionalGeneration(LlavaConfig(**common))

    def processor(self, words: PreTrainedTokenizerFast) -> Any:
        sizes: dict[str, Any] = {
            "size": {"shortest_edge": self.image},
            "crop_size": {"height": self.image, "width": self.image},
        }
        common: dict[str, Any] = {
            "tokenizer": words,
            "patch_size": self.patch,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": CHAT_TEMPLATE,
        }
        if self.pinpoints:
            tiles = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=self._lists())
            return LlavaNextProcessor(image_processor=tiles, **common)
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**sizes), **common)

    def _lists(self) -> list[list[int]]:
        """The pinpoints as configurations hold them."""
        return [list(size) for size in self.pinpoints]


LLAVA_7B = LlavaShape(
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    vocabulary=32064,
    image=336,
    patch=14,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
)
# Over Vicuna 7B, with the pinpoints of its configuration on the hub.
LLAVA_NEXT_7B = replace(
    LLAVA_7B, pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
)
