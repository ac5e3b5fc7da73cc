"""Architectures with random weights to measure speed on, in the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
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

from trio.benchmark.qwen import QWEN_7B, QwenShape, qwen_model, qwen_processor
from trio.demo.build import CHAT_TEMPLATE, tokenizer
from trio.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a LLaVA: a CLIP tower with a class token, a projector and a LLaMA decoder.

    pinpoints: heights and widths to which images are resized before they are cut into tiles; not
        empty makes it a LLaVA-NeXT.
    """

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


_LLAVA_7B = Shape(
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
SHAPES: dict[str, Shape | QwenShape] = {
    "tiny": Shape(
        hidden=128,
        intermediate=384,
        layers=16,
        heads=4,
        vocabulary=1000,
        image=96,
        patch=8,
        vision_hidden=64,
        vision_layers=2,
        vision_heads=2,
    ),
    "small": Shape(
        hidden=512,
        intermediate=1376,
        layers=16,
        heads=8,
        vocabulary=32000,
        image=336,
        patch=14,
        vision_hidden=256,
        vision_layers=6,
        vision_heads=4,
    ),
    "llava-1.5-7b": _LLAVA_7B,
    # Over Vicuna 7B, with the pinpoints of its configuration on the hub.
    "llava-next-7b": replace(
        _LLAVA_7B, pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    ),
    # Measured with images of 1008 x 1008 pixels, 1296 visual tokens.
    "qwen2.5-vl-7b": QWEN_7B,
}


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A random model of this shape, in eval mode on its device, and a processor that fits it.

    Raises:
        UserError: no such shape.
    """
    if name not in SHAPES:
        raise UserError(f"--shape {name} is not available in this version; there are: {_names()}")
    shape = SHAPES[name]
    processor = _processor(shape)
    with torch.device(device):
        model = _model(shape, processor.tokenizer)
    model = model.to(dtype).eval()
    _fill(model)
    return model, processor


def _model(shape: Shape | QwenShape, words: PreTrainedTokenizerFast) -> Any:
    """With whatever weights a fresh model has, on the default device."""
    if isinstance(shape, QwenShape):
        return qwen_model(shape, words)
    common: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image,
            patch_size=shape.patch,
            projection_dim=shape.vision_hidden,
        ),
        "text_config": LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            tie_word_embeddings=False,
        ),
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "image_seq_length": (shape.image // shape.patch) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    if shape.pinpoints:
        config = LlavaNextConfig(**common, image_grid_pinpoints=_lists(shape.pinpoints))
        return LlavaNextForConditionalGeneration(config)
    return LlavaForConditionalGeneration(LlavaConfig(**common))


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Weights that keep hidden states of unit size; norms as they start."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def _processor(shape: Shape | QwenShape) -> Any:
    if isinstance(shape, QwenShape):
        return qwen_processor(shape, tokenizer())
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": shape.image},
        "crop_size": {"height": shape.image, "width": shape.image},
    }
    common: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "patch_size": shape.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    if shape.pinpoints:
        tiles = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=_lists(shape.pinpoints))
        return LlavaNextProcessor(image_processor=tiles, **common)
    return LlavaProcessor(image_processor=CLIPImageProcessorPil(**sizes), **common)


def _lists(pinpoints: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """As configurations hold them."""
    return [list(size) for size in pinpoints]


def _names() -> str:
    return ", ".join(SHAPES)
