"""What all subjects answer: image files, and prompts with and without the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trio.engine.loading import load_outline
from trio.families.registry import adapt

Rows = list[dict[str, str]]


def write_requests(
    model: str, directory: Path, *, rounds: int, images: int, prompt_tokens: int, seed: int
) -> list[Rows]:
    """Requests of each round: one image of random pixels each, a PNG file of the size that gives
    most visual tokens, and random words. No two are alike, so that nobody's cache answers.

    Args:
        model: directory or hub id of the checkpoint that is to answer them.
        prompt_tokens: words of each prompt, each of them one token.

    Raises:
        UserError: no usable checkpoint.
    """
    outline, processor = load_outline(model)
    size = adapt(outline).largest_image
    rng = np.random.default_rng(seed)
    words = _words(processor.tokenizer, rng)
    return [
        [
            _request(
                directory / f"{number}-{place}.png",
                rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8),
                "".join(f" {next(words)}" for _ in range(prompt_tokens)),
                processor,
            )
            for place in range(images)
        ]
        for number in range(rounds)
    ]


def _request(file: Path, pixels: Any, prompt: str, processor: Any) -> dict[str, str]:
    Image.fromarray(pixels).save(file)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    message = {"role": "user", "content": content}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True)
    return {"image": str(file), "prompt": prompt, "rendered": rendered}


def _words(tokenizer: Any, rng: np.random.Generator) -> Iterator[str]:
    """Random words of ASCII letters, each a token of its own behind a space."""
    while True:
        token = int(rng.integers(len(tokenizer)))
        word = tokenizer.decode([token], skip_special_tokens=True).strip()
        whole = tokenizer.encode(f" {word}", add_special_tokens=False) == [token]
        if whole and word.isascii() and word.isalpha():
            yield word
