"""LLaVA-OneVision with random weights, for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from trio.demo.language import CHAT_TEMPLATE
from trio.families.llava_onevision import ImageProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class OnevisionShape:
    """Sizes of a LLaVA-OneVision: a SigLIP tower, a projector and a Qwen2 decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    image: int
    patch: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    edge: int
    """Tiles of the largest grid, a side; every grid up to it may be used."""

    def model(self, words: PreTrainedTokenizerFast) -> Any:
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=self.vision_intermediate,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_heads,
                image_size=self.image,
                patch_size=self.patch,
                vision_use_head=False,
            ),
            text_config=Qwen2Config(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                vocab_size=self.vocabulary,
                max_position_embeddings=32768,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            ),
            image_token_index=words.get_vocab()["<image>"],
            video_token_index=self.vocabulary - 1,
            image_grid_pinpoints=self._pinpoints(),
            tie_word_embeddings=False,
        )
        return LlavaOnevisionForConditionalGeneration(config)

    def processor(self, words: PreTrainedTokenizerFast) -> Any:
        side = {"height": self.image, "width": self.image}
        tiles = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=self._pinpoints())
        return ImageProcessor(
            image_processor=tiles,
            tokenizer=words,
            num_image_tokens=(self.image // self.patch) ** 2,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )

    def _pinpoints(self) -> list[list[int]]:
        edges = [self.image * count for count in range(1, self.edge + 1)]
        return [[height, width] for height in edges for width in edges]


# Over Qwen2 7B; the tower is SigLIP so400m without its last layer.
ONEVISION_7B = OnevisionShape(
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    vocabulary=152000,
    image=384,
    patch=14,
    vision_hidden=1152,
    vision_intermediate=4304,
    vision_layers=26,
    vision_heads=16,
    edge=6,
)
