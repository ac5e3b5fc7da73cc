"""A byte-level tokenizer of any size whose tokens are words: no engine refuses it."""

from __future__ import annotations

from itertools import islice
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trio.demo.language import MARKS, SPECIAL

SPACE = "\u0120"
"""How byte-level tokens write a space."""


def word_pieces(size: int) -> PreTrainedTokenizerFast:
    """The special tokens of the scenes' language, all bytes, and words of letters behind a space,
    the shortest first: `size` tokens, each of which spells a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    stems = [SPACE]
    missing = size - len(SPECIAL) - len(alphabet)
    while len(merges) < missing:
        pairs = ((stem, letter) for stem in stems for letter in ascii_lowercase)
        found = list(islice(pairs, missing - len(merges)))
        merges += found
        stems = ["".join(pair) for pair in found]
    pieces = [*SPECIAL, *alphabet, *map("".join, merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **MARKS,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )
