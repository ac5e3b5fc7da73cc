"""Batches for the patching tests, and what a row gives when it is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import trio
from tests.tiny.llava import IMAGE_TOKEN_ID, SPECIAL
from trio.decoder.cache_argument import CACHE, cache_of

PAD = SPECIAL.index("<pad>")
FIRST_WORD = len(SPECIAL)
Batch = dict[str, Tensor]


def rows(model: Any, images_per_row: Sequence[int], *, seed: int = 0) -> list[Batch]:
    """One batch of one for each row, of different lengths, its images between random words.

    Images of one prompt follow each other without a word between every other time.
    """
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vision_config.image_size
    visual = (size // model.config.vision_config.patch_size) ** 2
    made = []
    for index, count in enumerate(images_per_row):
        ids = _words(model, 2 + index, generator)
        for image in range(count):
            ids += [IMAGE_TOKEN_ID] * visual
            ids += _words(model, 3, generator) if image % 2 else []
        ids += _words(model, 6 + 3 * (index % 3), generator)
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        if count:
            batch["pixel_values"] = torch.randn(count, 3, size, size, generator=generator)
        made.append(batch)
    return made


def pad(singles: Sequence[Batch], side: str) -> Batch:
    """The rows as one batch, padded on one side."""
    width = max(row["input_ids"].shape[1] for row in singles)
    ids = torch.full((len(singles), width), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(singles):
        length = row["input_ids"].shape[1]
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[index, place] = row["input_ids"][0]
        mask[index, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    pixels = [row["pixel_values"] for row in singles if "pixel_values" in row]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def run(
    model: Any, batch: Batch, *, cache: Any = None, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """New tokens `[B, N]`, their logits `[B, N, V]` and the cache; greedy unless told otherwise."""
    usual = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    settings: dict[str, Any] = {**usual, **options}
    if cache is not None:
        settings[CACHE] = cache
    out = model.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1), cache_of(out)


def follow_up(batch: Batch, new: Tensor, ids: Tensor, mask: Tensor | None = None) -> Batch:
    """A conversation that goes on behind an answer."""
    mask = torch.ones_like(ids) if mask is None else mask
    masks = [batch["attention_mask"], torch.ones_like(new), mask]
    return {
        "input_ids": torch.cat([batch["input_ids"], new, ids], dim=1),
        "attention_mask": torch.cat(masks, dim=1),
    }


def assert_keeps_its_answers(model: Any, batch_of: Callable[[str], Batch]) -> None:
    """Patched to keep all tokens it answers as unpatched, and so it goes on: positions, and what is
    added in the first layers, are then all that could differ.

    batch_of: the same rows, padded on this side.
    """

    def both(side: str) -> list[tuple[Tensor, Tensor, Any]]:
        batch = batch_of(side)
        first = run(model, batch)
        question = torch.full((len(first[0]), 3), 20)
        return [first, run(model, follow_up(batch, first[0], question), cache=first[2])]

    wanted = both("left")  # unpatched, a right-padded row's first token is predicted from padding
    trio.patch(model, trio.Pruning(schedule="0:500,2:500"))
    for got in (both("left"), both("right")):
        for own, other in zip(got, wanted, strict=True):
            assert torch.equal(own[0], other[0])
            torch.testing.assert_close(own[1], other[1], atol=1e-3, rtol=1e-3)


def _words(model: Any, count: int, generator: torch.Generator) -> list[int]:
    vocabulary = model.config.text_config.vocab_size
    return torch.randint(FIRST_WORD, vocabulary, (count,), generator=generator).tolist()
