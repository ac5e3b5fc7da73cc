"""Tiny random LLaVA-OneVision models for tests, and processors that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.tiny.llava import word_tokenizer
from trio.families.llava_onevision import ImageProcessor

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<image>", "<video>")
IMAGE_TOKEN_ID = SPECIAL.index("<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> ASSISTANT:{% endif %}"
)
SIDE, PATCH = 44, 8
"""Pixels of a tile, which hold 5 x 5 patches and leave a rest, as 384 pixels and 14 do."""
TILE_TOKENS = (SIDE // PATCH) ** 2
ASPECT_RATIO = "anyres_max_4"
_TOWER_SPREAD = 0.15
"""Small, as a tower's rounding errors differ with the images beside an image."""


def pinpoints(side: int, most: int) -> list[list[int]]:
    """All grids of up to `most` tiles along an edge."""
    edges = [side * tiles for tiles in range(1, most + 1)]
    return [[height, width] for height in edges for width in edges]


def tiny_onevision(
    *, seed: int = 0, layers: int = 6, spread: float = 0.15, dtype: torch.dtype = torch.float32
) -> Any:
    """A random LLaVA-OneVision in eval mode: grids of up to 3 x 3 tiles, features of 4 of them.

    Visual features are as large as text embeddings; `spread` is the standard deviation of the
    weights behind the tower.
    """
    text = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        max_position_embeddings=1024,
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
    )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=SPECIAL.index("<video>"),
        image_grid_pinpoints=pinpoints(SIDE, 3),
        vision_aspect_ratio=ASPECT_RATIO,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.ndim > 1:
                    param.normal_(0.0, _TOWER_SPREAD if "vision_tower" in name else spread)
                elif name.endswith("bias"):
                    param.normal_(0.0, 0.05)
            model.get_input_embeddings().weight.normal_()
            model.model.image_newline.normal_()
            features = model.get_image_features(
                torch.randn(4, 3, SIDE, SIDE),
                torch.full((4, 2), SIDE),
                batch_num_images=torch.tensor([4]),
                return_dict=True,
            ).pooler_output
            projector = model.model.multi_modal_projector.linear_2
            projector.weight.div_(torch.cat([image[:-1] for image in features]).std())
            projector.bias.zero_()
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    return model.to(dtype)


def onevision_processor(
    *, side: int = SIDE, patch: int = PATCH, most: int = 3, aspect_ratio: str = ASPECT_RATIO
) -> ImageProcessor:
    """A word-level tokenizer without a first token, image processor on PIL and chat template.

    most: tiles along an edge of the largest grid.
    """
    fast = word_tokenizer(
        SPECIAL,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[SPECIAL[1], *SPECIAL[4:]],
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints(side, most)
    )
    return ImageProcessor(
        image_processor=images,
        tokenizer=fast,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect_ratio,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_onevision(directory: Path, **options: Any) -> Path:
    """Write model and processor with the files, and the names in them, that the hub has."""
    tiny_onevision(**options).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    save_file(older, directory / "model.safetensors", metadata={"format": "pt"})
    processor: Any = onevision_processor()
    images = processor.image_processor.to_dict()
    images["image_processor_type"] = "LlavaOnevisionImageProcessor"
    images["processor_class"] = "LlavaOnevisionProcessor"
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    own = {
        "image_token": "<image>",
        "num_image_tokens": TILE_TOKENS,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": ASPECT_RATIO,
        "vision_feature_select_strategy": "full",
    }
    (directory / "processor_config.json").write_text(json.dumps(own))
    processor.tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory
