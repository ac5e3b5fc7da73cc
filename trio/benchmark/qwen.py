"""Qwen2.5-VL with random weights, for measuring speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trio.demo.build import CHAT_TEMPLATE
from trio.models.qwen2_5_vl import ImageProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenShape:
    """Sizes of a Qwen2.5-VL.

    sections: of half a head of the decoder, the pairs that turn with time, row and column.
    window: edge of the tower's windows in pixels. whole: its blocks that attend to whole images.
    max_pixels: larger images are scaled down to it.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    sections: tuple[int, int, int]
    patch: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    window: int
    whole: tuple[int, ...]
    max_pixels: int


# The processor's bounds in pixels and the context of 128,000 are those of the hub's configuration.
QWEN_7B = QwenShape(
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    vocabulary=152064,
    positions=128000,
    sections=(16, 24, 24),
    patch=14,
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_layers=32,
    vision_heads=16,
    window=112,
    whole=(7, 15, 23, 31),
    max_pixels=16384 * 28**2,
)
_MIN_TOKENS = 4
"""Visual tokens that smaller images are scaled up to."""
_THETA = 1e6


def qwen_model(shape: QwenShape, words: PreTrainedTokenizerFast) -> Any:
    """With whatever weights a fresh model has, on the default device."""
    text = Qwen2_5_VLTextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _THETA,
            "mrope_section": list(shape.sections),
        },
        rms_norm_eps=1e-6,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=shape.vision_layers,
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate,
        num_heads=shape.vision_heads,
        patch_size=shape.patch,
        window_size=shape.window,
        fullatt_block_indexes=list(shape.whole),
        out_hidden_size=shape.hidden,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.get_vocab()["<image>"],
        # Tokens of videos and around images, which these prompts do without.
        video_token_id=shape.vocabulary - 1,
        vision_start_token_id=shape.vocabulary - 2,
        vision_end_token_id=shape.vocabulary - 3,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_processor(shape: QwenShape, words: PreTrainedTokenizerFast) -> ImageProcessor:
    smallest = _MIN_TOKENS * (2 * shape.patch) ** 2
    images = Qwen2VLImageProcessorPil(
        patch_size=shape.patch,
        size={"shortest_edge": smallest, "longest_edge": shape.max_pixels},
    )
    return ImageProcessor(image_processor=images, tokenizer=words, chat_template=CHAT_TEMPLATE)
