"""Tiny random models for tests: LLaVA, LLaVA-NeXT over any LLaMA-type decoder; processors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = """
    USER: ASSISTANT: what which where how many is are there the a an of in on and or red green blue
    yellow digit number colour left right top bottom zero one two three four five six seven eight
    nine image picture describe this please answer yes no ? . ,
"""
WORDS = tuple(_WORDS.split())
IMAGE_TOKEN_ID = SPECIAL.index("<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
Family = Literal["llama", "mistral", "qwen2", "qwen3"]
Tower = Literal["clip", "siglip"]
Strategy = Literal["default", "full"]
"""Whether the first feature of a picture is dropped."""
Pinpoints = tuple[tuple[int, int], ...]
"""Heights and widths to which LLaVA-NeXT resizes images before it cuts them into tiles."""
HUB_PINPOINTS: Pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Of the checkpoints of 7B, whose tiles have 336 pixels an edge."""
PINPOINTS: Pinpoints = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
"""The same for tiles of 32 pixels."""
LLAVA_NEXT: dict[str, Any] = {"pinpoints": PINPOINTS, "patch_size": 8, "max_positions": 1024}
"""Makes `tiny_llava` a LLaVA-NeXT: 16 visual tokens a tile, and 88 of the largest image."""
_TEXT_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": partial(Qwen3Config, head_dim=12),
}


def tiny_llava(
    *,
    seed: int = 0,
    family: Family = "llama",
    layers: int = 6,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 32,
    patch_size: int = 4,
    vocab_size: int = 80,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.15,
    pinpoints: Pinpoints | None = None,
    tower: Tower = "clip",
    strategy: Strategy = "default",
    vision_use_head: bool = False,
    **text_options: Any,
) -> Any:
    """A random LLaVA with `(image_size / patch_size) ** 2` visual tokens, in eval mode.

    Those are without a class token: one more with a CLIP tower and "full", and one less with a
    SigLIP tower and "default". `vision_use_head` is of a SigLIP tower.

    With `pinpoints` a LLaVA-NeXT, that many tokens for each tile. Visual features are as large as
    text embeddings; `spread` is the standard deviation of the decoder's weights, large enough
    that attention is not flat.
    """
    text = _TEXT_CONFIGS[family](
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        initializer_range=spread,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        **text_options,
    )
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    vision: Any = (
        CLIPVisionConfig(**sizes, projection_dim=24, initializer_range=spread)
        if tower == "clip"
        else SiglipVisionConfig(**sizes, vision_use_head=vision_use_head)
    )
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": IMAGE_TOKEN_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "image_seq_length": (image_size // patch_size) ** 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(common, pinpoints).eval()
        with torch.no_grad():
            randomise(model, spread, bias_spread=0.05)
            _level_embeddings(model, image_size)
    model.generation_config.pad_token_id = SPECIAL.index("<pad>")
    model.generation_config.eos_token_id = SPECIAL.index("</s>")
    return model.to(dtype)


def randomise(model: Any, spread: float, *, bias_spread: float) -> None:
    """New weights for all but the norms; those of queries and keys are no longer 1."""
    for name, param in model.named_parameters():
        if param.ndim > 1:
            param.normal_(0.0, spread)
        elif name.endswith("bias"):
            param.normal_(0.0, bias_spread)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            param.uniform_(0.5, 1.5)


def _model(common: dict[str, Any], pinpoints: Pinpoints | None) -> Any:
    if pinpoints is None:
        return LlavaForConditionalGeneration(LlavaConfig(**common))
    config = LlavaNextConfig(**common, image_grid_pinpoints=[list(size) for size in pinpoints])
    return LlavaNextForConditionalGeneration(config)


def _level_embeddings(model: Any, image_size: int) -> None:
    """Text embeddings and visual features of unit size, so that tokens differ in the result."""
    model.get_input_embeddings().weight.normal_()
    pixels = torch.randn(4, 3, image_size, image_size)
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    drop = model.config.vision_feature_select_strategy == "default"
    selected = tower.hidden_states[model.config.vision_feature_layer][:, int(drop) :]
    features = model.model.multi_modal_projector(selected)
    projector = model.model.multi_modal_projector.linear_2
    projector.weight.div_(features.std())
    projector.bias.zero_()
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.normal_()


def word_tokenizer(special: tuple[str, ...], **named: Any) -> PreTrainedTokenizerFast:
    """Special tokens first, then `WORDS`, told apart by white space; pads on the left."""
    words = [*special, *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", padding_side="left", **named
    )


def tiny_processor(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    pinpoints: Pinpoints | None = None,
    tower: Tower = "clip",
    strategy: Strategy = "default",
) -> Any:
    """A word-level tokenizer, the model's image processor on PIL, and a chat template."""
    fast = word_tokenizer(
        SPECIAL,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": image_size, "width": image_size}
    common: dict[str, Any] = {
        "tokenizer": fast,
        "patch_size": patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(tower == "clip"),
        "chat_template": CHAT_TEMPLATE,
    }
    if tower == "siglip":
        return LlavaProcessor(image_processor=SiglipImageProcessorPil(size=side), **common)
    if pinpoints is None:
        images = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)
        return LlavaProcessor(image_processor=images, **common)
    tiles = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size=side,
        image_grid_pinpoints=[list(size) for size in pinpoints],
    )
    return LlavaNextProcessor(image_processor=tiles, **common)


def save_tiny_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a tiny LLaVA and its processor as `from_pretrained` expects them."""
    model = tiny_llava(**options)
    model.save_pretrained(directory)
    vision = model.config.vision_config
    processor = tiny_processor(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        **{name: options[name] for name in ("pinpoints", "tower", "strategy") if name in options},
    )
    processor.save_pretrained(directory)
    return directory
