"""Tiny random Qwen2.5-VL models for tests, and processors that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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

from tests.tiny.llava import randomise, word_tokenizer
from trio.families.qwen2_5_vl import ImageProcessor

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<unk>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_TOKEN_ID = SPECIAL.index("<|image_pad|>")
CHAT_TEMPLATE = (
    "<|im_start|> describe the picture <|im_end|> "
    "{% for message in messages %}<|im_start|> {{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> ASSISTANT:{% endif %}"
)
PATCH = 4
SECTIONS = [2, 3, 3]
"""Of the halves of a head of 16, turned by time, row and column."""
LARGEST = 80
"""Visual tokens that an image is scaled down to."""


def tiny_qwen(
    *, seed: int = 0, layers: int = 6, spread: float = 0.15, dtype: torch.dtype = torch.float32
) -> Any:
    """A random Qwen2.5-VL in eval mode: visual tokens of 8 x 8 pixels, windows of 4 x 4 of them.

    Visual features are as large as text embeddings; `spread` is the standard deviation of weights.
    """
    text = Qwen2_5_VLTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS},
        bos_token_id=None,
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        eos_token_id=SPECIAL.index("<|im_end|>"),
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=4,
        hidden_size=24,
        intermediate_size=40,
        num_heads=2,
        patch_size=PATCH,
        window_size=32,
        fullatt_block_indexes=[1, 3],
        out_hidden_size=64,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            randomise(model, spread, bias_spread=0.2)
            model.get_input_embeddings().weight.normal_()
            pixels = torch.randn(256, 3 * 2 * PATCH**2)
            merger = model.model.visual.merger.mlp[2]
            (features,) = model.get_image_features(
                pixels, torch.tensor([[1, 16, 16]]), return_dict=True
            ).pooler_output
            merger.weight.div_(features.std())
            merger.bias.zero_()
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    return model.to(dtype)


def tiny_qwen_processor() -> ImageProcessor:
    """A word-level tokenizer without a first token, image processor on PIL and chat template."""
    return ImageProcessor(
        image_processor=image_processor(), tokenizer=tokenizer(), chat_template=CHAT_TEMPLATE
    )


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(
        SPECIAL,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[1:2], *SPECIAL[4:]],
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        size={"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": LARGEST * (2 * PATCH) ** 2},
    )


def save_tiny_qwen(directory: Path, **options: Any) -> Path:
    """Write model and processor with the files, and the names in them, that the hub has."""
    tiny_qwen(**options).save_pretrained(directory)
    processor: Any = tiny_qwen_processor()
    images = processor.image_processor.to_dict()
    size = images.pop("size")
    images["min_pixels"], images["max_pixels"] = size["shortest_edge"], size["longest_edge"]
    images["image_processor_type"] = "Qwen2VLImageProcessor"
    images["processor_class"] = "Qwen2_5_VLProcessor"
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    _flatten(directory / "config.json")
    processor.tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def _flatten(file: Path) -> None:
    """As the hub's configs are: the decoder's settings beside the tower's, and older names."""
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text.pop("layer_types")
    config["vision_config"]["model_type"] = "qwen2_5_vl"
    file.write_text(json.dumps({**text, **config}))
