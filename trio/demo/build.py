"""The demo model's shape, vocabulary and processor: LLaVA-1.5 in miniature.

576 visual tokens from a CLIP tower with a class token, a two-layer projector and a LLaMA decoder of
16 layers; about 4.5 million parameters. Kept counts therefore mean what they mean for LLaVA-1.5.
"""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trio.demo.scenes import CELL, CELL_NAMES, COLOURS, GRID

PATCH = 8
LAYERS = 16
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "user assistant system : , . ? which what where is there are how many digits digit color the "
    "a an and describe image"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the scenes' language; other words become `<unk>`."""
    words = [*WORDS.split(), *map(str, range(10)), *COLOURS, "yes", "no"]
    words += [word for name in CELL_NAMES for word in name.split()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )


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
        num_attention_heads=2,
        image_size=GRID * CELL,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
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
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = grid_waves(GRID * CELL // PATCH, positions.shape[1])
    return model


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Where the position embedding starts, [side * side, width]: waves over rows and columns.

    From random numbers the tower takes thousands of steps to find out which patches are neighbours.
    """
    frequency = torch.logspace(math.log10(1.5), math.log10(0.05), width // 4)
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows = line[:, None].expand(-1, side, -1)
    columns = line[None].expand(side, -1, -1)
    return 0.2 * torch.cat([rows, columns], 2).flatten(0, 1)
