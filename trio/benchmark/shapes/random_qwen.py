"""Qwen2.5-VL and Qwen3-VL with random weights, for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from trio.demo.language import CHAT_TEMPLATE
from trio.families.qwen2_5_vl import ImageProcessor as Qwen25Processor
from trio.families.qwen3_vl import ImageProcessor as Qwen3Processor

_MIN_TOKENS = 4
"""Visual tokens that smaller images are scaled up to."""
_MERGE = 2
"""Patches along an edge of what becomes a visual token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _QwenShape:
    """What the sizes of both have in common."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    theta: float
    sections: tuple[int, int, int]
    """Of half a head of the decoder, the pairs that turn with time, row and column."""
    patch: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    max_pixels: int
    """Larger images are scaled down to it."""
    processor_class: ClassVar[Any]

    def processor(self, words: PreTrainedTokenizerFast) -> Any:
        pixels = (_MERGE * self.patch) ** 2
        images = Qwen2VLImageProcessorPil(
            patch_size=self.patch,
            size={"shortest_edge": _MIN_TOKENS * pixels, "longest_edge": self.max_pixels},
        )
        return self.processor_class(
            image_processor=images, tokenizer=words, chat_template=CHAT_TEMPLATE
        )

    def _text(self, words: PreTrainedTokenizerFast) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.theta,
                "mrope_section": list(self.sections),
            },
            "rms_norm_eps": 1e-6,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        }

    def _vision(self) -> dict[str, Any]:
        return {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_heads": self.vision_heads,
            "patch_size": self.patch,
            "spatial_merge_size": _MERGE,
            "out_hidden_size": self.hidden,
        }

    def _tokens(self, words: PreTrainedTokenizerFast) -> dict[str, Any]:
        return {
            "image_token_id": words.get_vocab()["<image>"],
            # Tokens of videos and around images, which these prompts do without.
            "video_token_id": self.vocabulary - 1,
            "vision_start_token_id": self.vocabulary - 2,
            "vision_end_token_id": self.vocabulary - 3,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen25Shape(_QwenShape):
    """Sizes of a Qwen2.5-VL."""

    window: int
    """Edge of the tower's windows in pixels."""
    whole: tuple[int, ...]
    """Blocks of the tower that attend to whole images."""
    processor_class: ClassVar[Any] = Qwen25Processor

    def model(self, words: PreTrainedTokenizerFast) -> Any:
        config = Qwen2_5_VLConfig(
            text_config=Qwen2_5_VLTextConfig(**self._text(words)),
            vision_config=Qwen2_5_VLVisionConfig(
                **self._vision(),
                window_size=self.window,
                fullatt_block_indexes=list(self.whole),
            ),
            **self._tokens(words),
        )
        return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Shape(_QwenShape):
    """Sizes of a Qwen3-VL."""

    head: int
    """Width of an attention head of the decoder."""
    positions_learnt: int
    """Position embeddings of the tower, in a square."""
    deepstack: tuple[int, ...]
    """Blocks of the tower whose features join those of early decoder layers."""
    processor_class: ClassVar[Any] = Qwen3Processor

    def model(self, words: PreTrainedTokenizerFast) -> Any:
        config = Qwen3VLConfig(
            text_config=Qwen3VLTextConfig(**self._text(words), head_dim=self.head),
            vision_config=Qwen3VLVisionConfig(
                **self._vision(),
                num_position_embeddings=self.positions_learnt,
                deepstack_visual_indexes=list(self.deepstack),
            ),
            **self._tokens(words),
        )
        return Qwen3VLForConditionalGeneration(config)


# The processors' bounds in pixels and the contexts are those of the hub's configurations.
QWEN2_5_7B = Qwen25Shape(
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    vocabulary=152064,
    positions=128000,
    theta=1e6,
    sections=(16, 24, 24),
    patch=14,
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_layers=32,
    vision_heads=16,
    max_pixels=16384 * 28**2,
    window=112,
    whole=(7, 15, 23, 31),
)
QWEN3_8B = Qwen3Shape(
    hidden=4096,
    intermediate=12288,
    layers=36,
    heads=32,
    kv_heads=8,
    head=128,
    vocabulary=151936,
    positions=262144,
    theta=5e6,
    sections=(24, 20, 20),
    patch=16,
    vision_hidden=1152,
    vision_intermediate=4304,
    vision_layers=27,
    vision_heads=16,
    max_pixels=16384 * 32**2,
    positions_learnt=2304,
    deepstack=(8, 16, 24),
)
