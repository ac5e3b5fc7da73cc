"""Training batches: scenes with several questions each, all sharing one pass over the image.

A sequence is `<s> user : IMAGE` followed by the segments `question assistant : answer </s>`. Each
segment sees the image and itself, and counts its positions from the image's end, so every segment
is trained exactly as if it stood alone behind the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from trio.demo.build import PATCH
from trio.demo.scenes import (
    GRID,
    KINDS,
    Question,
    Scene,
    Split,
    make_scene,
    patch_labels,
    questions,
)

QUESTIONS_PER_SCENE = 9
_WEIGHTS = {"digit": 1.0, "color": 1.5, "position": 0.6, "presence": 0.8, "count": 0.8}
_TOKEN_WEIGHT = {"caption": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """N scenes; P patches each; R text tokens each, padded."""

    pixels: torch.Tensor
    """[N, 3, side, side] float32 in -1…1."""
    patch_positions: torch.Tensor
    """[P + 1] rows of the tower's position embedding, the class token first."""
    patch_digit: torch.Tensor
    """[N, P], 10 = background."""
    patch_color: torch.Tensor
    """[N, P], number of colours = background."""
    patch_cell: torch.Tensor
    """[P] cell of the full grid."""
    shown_digits: torch.Tensor
    """[N, 10] float32, 1 where the digit is in the scene."""
    shown_colors: torch.Tensor
    """[N, colours] float32."""
    tokens: torch.Tensor
    """[N, R]."""
    offsets: torch.Tensor
    """[N, R] position of each token behind the image."""
    segments: torch.Tensor
    """[N, R] segment number, -1 = padding."""
    kinds: torch.Tensor
    """[N, R] index into `KINDS`."""
    targets: torch.Tensor
    """[N, R] the next token where it belongs to an answer, else -100."""
    weights: torch.Tensor
    """[N, R] weight of each target in the loss."""


def make_batch(
    rng: np.random.Generator,
    vocabulary: PreTrainedTokenizerFast,
    split: Split,
    size: int,
    grid: int,
) -> Batch:
    """Draw `size` scenes of `grid` x `grid` cells, all at one place of the full grid."""
    origin = (int(rng.integers(GRID - grid + 1)), int(rng.integers(GRID - grid + 1)))
    scenes = [make_scene(rng, split, grid=grid, origin=origin) for _ in range(size)]
    labels = [patch_labels(scene, PATCH) for scene in scenes]
    pixels = np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2)
    text = _pack(rng, vocabulary, scenes)
    patch_rows, patch_cell = _places(grid, origin)
    return Batch(
        pixels=torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1),
        patch_positions=patch_rows,
        patch_digit=torch.from_numpy(np.stack([digit for digit, _ in labels])),
        patch_color=torch.from_numpy(np.stack([color for _, color in labels])),
        patch_cell=patch_cell,
        shown_digits=_shown([digit for digit, _ in labels], 10),
        shown_colors=_shown([color for _, color in labels], 6),
        **text,
    )


def _places(grid: int, origin: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    per_cell = 64 // PATCH
    side = GRID * per_cell
    rows = torch.arange(grid * per_cell) + origin[0] * per_cell
    columns = torch.arange(grid * per_cell) + origin[1] * per_cell
    index = (rows[:, None] * side + columns[None, :]).reshape(-1)
    cell = (rows[:, None] // per_cell * GRID + columns[None, :] // per_cell).reshape(-1)
    return torch.cat([torch.zeros(1, dtype=torch.long), index + 1]), cell


def _shown(labels: list[np.ndarray], classes: int) -> torch.Tensor:
    shown = np.zeros((len(labels), classes + 1), np.float32)
    for row, label in zip(shown, labels, strict=True):
        row[np.unique(label)] = 1
    return torch.from_numpy(shown[:, :classes])


def _choose(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """The caption and a weighted choice of the other questions."""
    asked = questions(rng, scene)
    rest = [question for question in asked if question.kind != "caption"]
    weight = np.array([_WEIGHTS[question.kind] for question in rest])
    count = min(QUESTIONS_PER_SCENE - 1, len(rest))
    picked = rng.choice(len(rest), count, replace=False, p=weight / weight.sum())
    return [asked[0], *(rest[index] for index in picked)]


def _pack(
    rng: np.random.Generator, vocabulary: PreTrainedTokenizerFast, scenes: list[Scene]
) -> dict[str, torch.Tensor]:
    rows: list[list[tuple[int, int, int, int, int, float]]] = []
    for scene in scenes:
        row: list[tuple[int, int, int, int, int, float]] = []
        for number, question in enumerate(_choose(rng, scene)):
            ask = _ids(vocabulary, question.prompt + " assistant :")
            answer = [*_ids(vocabulary, question.answer), vocabulary.eos_token_id]
            tokens = ask + answer[:-1]
            targets = [-100] * (len(ask) - 1) + answer
            kind = KINDS.index(question.kind)
            weight = _TOKEN_WEIGHT.get(question.kind, 1.0)
            row += [
                (token, offset, number, kind, target, weight)
                for offset, (token, target) in enumerate(zip(tokens, targets, strict=True))
            ]
        rows.append(row)
    longest = -(-max(map(len, rows)) // 16) * 16
    padding = (vocabulary.pad_token_id, 0, -1, 0, -100, 0.0)
    columns = np.array([row + [padding] * (longest - len(row)) for row in rows], np.float64)
    names = ("tokens", "offsets", "segments", "kinds", "targets", "weights")
    packed = {name: torch.from_numpy(columns[..., i]) for i, name in enumerate(names)}
    return {
        name: value.float() if name == "weights" else value.long() for name, value in packed.items()
    }


_cache: dict[str, list[int]] = {}


def _ids(vocabulary: PreTrainedTokenizerFast, text: str) -> list[int]:
    if text not in _cache:
        if len(_cache) > 100_000:
            _cache.clear()
        _cache[text] = vocabulary(text, add_special_tokens=False).input_ids
    return _cache[text]
