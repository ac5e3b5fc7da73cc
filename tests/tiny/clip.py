"""A tiny random CLIP, text tower and projections included."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

CONTEXT = 8
"""Tokens of the longest text."""


def tiny_clip(
    vision: dict[str, Any], *, words: int, begin: int, end: int, joint: int, seed: int
) -> Any:
    """With a vision tower of this config and a joint space of `joint` numbers; of a vocabulary of
    so many words, `begin` and `end` stand around a text."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": words,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": begin,
        "eos_token_id": end,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=joint,
            initializer_factor=5.0,
        )
        return CLIPModel(config).eval()
