"""A tiny LLaVA whose tokenizer spells text byte by byte, and a tokenizer like LLaMA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.engine.test_preprocess import byte_level_processor
from tests.tiny.llava import tiny_llava

EOS = 1


def spelling_llava(**options: Any) -> tuple[Any, Any]:
    """Model and processor; the vocabulary of the model is the larger one."""
    model = tiny_llava(**{"spread": 0.4, "layers": 2, "vocab_size": 300, **options})
    processor = byte_level_processor()
    model.config.image_token_id = processor.image_token_id
    model.generation_config.eos_token_id = EOS
    return model, processor


def save_spelling_llava(directory: Path) -> Path:
    for part in spelling_llava():
        part.save_pretrained(directory)
    return directory


def metaspace_tokenizer() -> Any:
    """Words begin with a letter that stands for the space before them; unknown bytes are tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz0123456789", "\u2581y", "\u2581ye", "\u2581yes"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("\u2581", "y"), ("\u2581y", "e"), ("\u2581ye", "s")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
