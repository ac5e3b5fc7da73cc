"""A checkpoint of random weights that other engines load, too."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trio.benchmark.shapes.random_llava import LlavaShape
from trio.benchmark.shapes.sizes import SHAPES, fill_weights, named
from trio.benchmark.speed.peers.word_pieces import word_pieces
from trio.errors import UserError

TOWER, HUB_TOWER = "vision_tower.", "vision_tower.vision_model."
"""How names of a CLIP tower's weights begin: as transformers 5 writes them, and in the checkpoints
on the hub, which is what other engines look for."""


def check_shape(name: str) -> LlavaShape:
    """The shape of this name.

    Raises:
        UserError: no such shape, or one of another family.
    """
    shape = named(name)
    if not isinstance(shape, LlavaShape):
        there = ", ".join(key for key, one in SHAPES.items() if isinstance(one, LlavaShape))
        raise UserError(
            f"--shape {name} is not written for other engines; there are: {there} (or give --model)"
        )
    return shape


def write_checkpoint(name: str, directory: Path, dtype: torch.dtype) -> None:
    """Model and processor of a shape, with a tokenizer whose tokens all spell text.

    Raises:
        UserError: as of `check_shape`.
    """
    shape = check_shape(name)
    words = word_pieces(shape.vocabulary)
    model = shape.model(words).to(dtype).eval()
    fill_weights(model)
    model.save_pretrained(directory, max_shard_size="1TB")
    shape.processor(words).save_pretrained(directory)
    _rename(directory / "model.safetensors")


def _rename(file: Path) -> None:
    """Give the tower's weights in a file the names that the hub has for them."""
    written = file.with_suffix(".renamed")
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        for key in opened.keys():  # noqa: SIM118 -- not a mapping
            hub = key.replace(TOWER, HUB_TOWER, 1) if key.startswith(TOWER) else key
            tensors[hub] = opened.get_tensor(key)
        save_file(tensors, written, about)
    written.replace(file)
