"""The demo model's shape, vocabulary and processor: LLaVA-1.5 in miniature.

576 visual tokens from a CLIP tower with a class token, a two-layer projector and a LLaMA decoder of
16 layers; about 4.5 million parameters. Kept counts therefore mean what they mean for LLaVA-1.5.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trio.demo.language import CHAT_TEMPLATE, tokenizer
from trio.demo.scenes import CELL, GRID

PATCH = 8
LAYERS = 16


def processor() -> LlavaProcessor:
    side = GRID * CELL
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config(vocabulary: PreTrainedTokenizerFast, layers: int = LAYERS) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=GRID * CELL,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        # Lookups are learnt much sooner with sharper first attention, and with more rotary
        # frequencies that hardly turn over 576 tokens.
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        vocab_size=len(vocabulary),
        max_position_embeddings=2048,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary.get_vocab()["<image>"],
        image_seq_length=(GRID * CELL // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def new_model(vocabulary: PreTrainedTokenizerFast, layers: int) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration(config(vocabulary, layers))
    look_around(model.model.vision_tower)
    return model


@torch.no_grad()
def look_around(tower: CLIPVisionModel) -> None:
    """Start the tower as a stencil: in every layer each head looks at one neighbour of a patch.

    From random numbers the tower has to find out which patches are neighbours, and stays at chance
    for thousands of steps. Half of the width holds sines and cosines of row and column, the other
    half the pixels; a query and a key that differ by a rotation meet at a fixed offset.
    """
    width, half = tower.config.hidden_size, tower.config.hidden_size // 2
    embeddings = tower.embeddings
    frequency = torch.logspace(math.log10(1.5), math.log10(0.05), half // 4)
    positions = _waves(torch.arange(GRID * CELL // PATCH), frequency)
    side = len(positions)
    rows = positions[:, None].expand(-1, side, -1)
    columns = positions[None].expand(side, -1, -1)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :half] = torch.cat([rows, columns], 2).flatten(0, 1)
    embeddings.patch_embedding.weight[:half] = 0
    embeddings.patch_embedding.weight[half:] *= 5
    embeddings.class_embedding[:half] = 0
    layers: Any = tower.encoder.layers
    for layer in layers:
        attention = layer.self_attn
        attention.v_proj.weight *= 2
        for head, offset in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            _aim(attention, head, offset, frequency, width // 4)
        attention.out_proj.weight[:half] = 0
        layer.mlp.fc2.weight[:half] = 0


def _waves(places: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    angle = places[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def _aim(
    attention: Any, head: int, offset: tuple[int, int], frequency: torch.Tensor, size: int
) -> None:
    """Let a head's query at (row, column) meet the key at (row, column) + offset."""
    waves, sharpness = len(frequency), 3.0
    query, key = (
        getattr(attention, name).weight[head * size : (head + 1) * size]
        for name in ("q_proj", "k_proj")
    )
    query.zero_()
    key.zero_()
    picked = torch.arange(0, waves, 2)
    for axis, shift in enumerate(offset):
        base = axis * 2 * waves
        for number, wave in enumerate(picked.tolist()):
            sine, cosine = base + wave, base + waves + wave
            out = axis * len(picked) * 2 + 2 * number
            turn = float(frequency[wave]) * shift
            query[out, sine] = query[out + 1, cosine] = sharpness
            key[out, sine] = key[out + 1, cosine] = sharpness * math.cos(turn)
            key[out, cosine] = -sharpness * math.sin(turn)
            key[out + 1, sine] = sharpness * math.sin(turn)
