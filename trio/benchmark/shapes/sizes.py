"""Architectures with random weights, in the published sizes and in small ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerFast

from trio.benchmark.shapes.random_llava import LLAVA_7B, LLAVA_NEXT_7B, LlavaShape
from trio.benchmark.shapes.random_onevision import ONEVISION_7B
from trio.benchmark.shapes.random_qwen import QWEN2_5_7B, QWEN3_8B
from trio.demo.language import tokenizer
from trio.errors import UserError


class Shape(Protocol):
    """Sizes of a model of one family."""

    def model(self, words: PreTrainedTokenizerFast) -> Any:
        """With whatever weights a fresh model has, on the default device."""
        ...

    def processor(self, words: PreTrainedTokenizerFast) -> Any:
        """One that fits the model."""
        ...


SHAPES: dict[str, Shape] = {
    "tiny": LlavaShape(
        hidden=128,
        intermediate=384,
        layers=16,
        heads=4,
        vocabulary=1000,
        image=96,
        patch=8,
        vision_hidden=64,
        vision_layers=2,
        vision_heads=2,
    ),
    "small": LlavaShape(
        hidden=512,
        intermediate=1376,
        layers=16,
        heads=8,
        vocabulary=32000,
        image=336,
        patch=14,
        vision_hidden=256,
        vision_layers=6,
        vision_heads=4,
    ),
    "llava-1.5-7b": LLAVA_7B,
    "llava-next-7b": LLAVA_NEXT_7B,
    "qwen2.5-vl-7b": QWEN2_5_7B,
    "qwen3-vl-8b": QWEN3_8B,
    "llava-onevision-7b": ONEVISION_7B,
}
PUBLISHED = [name for name in SHAPES if name not in ("tiny", "small")]
"""Those of models that people use."""


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A random model of this shape, in eval mode on its device, and a processor that fits it.

    Raises:
        UserError: no such shape.
    """
    with torch.device(device):
        model = named(name).model(tokenizer())
    model = model.to(dtype).eval()
    fill_weights(model)
    return model, processor(name)


def blueprint(name: str) -> Any:
    """A model of this shape without weights, on the meta device, to count on.

    Raises:
        UserError: no such shape.
    """
    with torch.device("meta"):
        return named(name).model(tokenizer()).to(torch.bfloat16).eval()


def processor(name: str) -> Any:
    """One that fits the models of this shape."""
    return named(name).processor(tokenizer())


def named(name: str) -> Shape:
    """The shape of this name.

    Raises:
        UserError: no such shape.
    """
    if name not in SHAPES:
        raise UserError(
            f"--shape {name} is not available in this version; there are: {', '.join(SHAPES)}"
        )
    return SHAPES[name]


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> None:
    """Weights that keep hidden states of unit size; norms as they start."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
