"""Tiny random Qwen3-VL models for tests, and processors that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from tests.tiny.llava import randomise
from tests.tiny.qwen2_5_vl import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    PATCH,
    SPECIAL,
    image_processor,
    tokenizer,
)
from trio.families.qwen3_vl import ImageProcessor

HEAD = 24
SECTIONS = [6, 3, 3]
"""Of the halves of a head of 24, turned by time, row and column."""
INJECTED = 3
"""Decoder layers behind which visual tokens get more."""


def tiny_qwen3(
    *,
    seed: int = 0,
    layers: int = 6,
    spread: float = 0.15,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A random Qwen3-VL in eval mode: visual tokens of 8 x 8 pixels, heads of 24 instead of 16.

    What is injected is about as large as the hidden states to which it is added; norms of queries
    and keys weigh each number differently; `spread` is the standard deviation of weights. `tied`:
    the output head is the input's embedding, as in the checkpoints of 2B and 4B.
    """
    # Not all that a config takes is in its signature.
    special: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "tie_word_embeddings": tied,
    }
    text = Qwen3VLTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        vocab_size=80,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": SECTIONS,
            "mrope_interleaved": True,
        },
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        **special,
    )
    vision = Qwen3VLVisionConfig(
        depth=5,
        hidden_size=24,
        intermediate_size=40,
        num_heads=2,
        patch_size=PATCH,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 2, 3],
        out_hidden_size=64,
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            randomise(model, spread, bias_spread=0.2)
            model.get_input_embeddings().weight.normal_()
            _level_features(model)
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.eos_token_id = special["eos_token_id"]
    return model.to(dtype)


def _level_features(model: Any) -> None:
    """Visual features as large as text embeddings, injected ones as what they are added to."""
    tower, decoder = model.model.visual, model.model.language_model
    pixels = torch.randn(256, 3 * 2 * PATCH**2)
    out = model.get_image_features(pixels, torch.tensor([[1, 16, 16]]), return_dict=True)
    hidden = decoder(inputs_embeds=torch.randn(1, 64, 64), output_hidden_states=True).hidden_states
    levels = [(tower.merger, out.pooler_output[0], 1.0)]
    for merger, layer, beside in zip(
        tower.deepstack_merger_list, out.deepstack_features, hidden[1:], strict=False
    ):
        # In some versions of transformers divided into images, of which there is one here.
        features = layer if isinstance(layer, torch.Tensor) else layer[0]
        levels.append((merger, features, float(beside.std())))
    for merger, features, size in levels:
        merger.linear_fc2.weight.mul_(size / features.std())
        merger.linear_fc2.bias.zero_()


def tiny_qwen3_processor() -> ImageProcessor:
    """A word-level tokenizer without a first token, image processor on PIL and chat template."""
    return ImageProcessor(
        image_processor=image_processor(), tokenizer=tokenizer(), chat_template=CHAT_TEMPLATE
    )


def save_tiny_qwen3(directory: Path, **options: Any) -> Path:
    """Write model and processor with the files, and the names in them, that the hub has."""
    tiny_qwen3(**options).save_pretrained(directory)
    processor: Any = tiny_qwen3_processor()
    images = processor.image_processor.to_dict()
    images["image_processor_type"] = "Qwen2VLImageProcessorFast"
    images["processor_class"] = "Qwen3VLProcessor"
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    videos = {**images, "video_processor_type": "Qwen3VLVideoProcessor"}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(videos))
    _rename(directory / "config.json")
    processor.tokenizer.save_pretrained(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return directory


def _rename(file: Path) -> None:
    """To the names that the hub's configs have."""
    config = json.loads(file.read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["model_type"] = "qwen3_vl"
    file.write_text(json.dumps(config))
