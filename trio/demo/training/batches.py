"""Training batches: scenes with several questions each, all sharing one pass over the image.

A sequence is `<s> user : IMAGE` followed by the segments `question assistant : answer </s>`. Each
segment sees the image and itself, and counts its positions from the image's end, so every segment
is trained exactly as if it stood alone behind the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from trio.demo.scenes import (
    CELL,
    COLOURS,
    GRID,
    KINDS,
    Question,
    Scene,
    Split,
    make_scene,
    patch_items,
    questions,
)
from trio.demo.training.build import PATCH

QUESTIONS_PER_SCENE = 9
_WEIGHTS = {"digit": 0.7, "color": 1.0, "position": 1.2, "presence": 0.7, "count": 0.5}
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
    patch_strokes: torch.Tensor
    """[N, P, 64] float32: the handwritten sample under each patch, 0 for background."""
    patch_cell: torch.Tensor
    """[N, P] cell of the full grid that the object is in, 9 = background."""
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
    plain: bool = False,
    crowded: bool = False,
) -> Batch:
    """Draw `size` scenes of `grid` x `grid` cells, all at one place of the full grid. The digits
    of plain scenes have no colour to be learnt: -100 in `patch_color`."""
    origin = (int(rng.integers(GRID - grid + 1)), int(rng.integers(GRID - grid + 1)))
    scenes = [
        make_scene(rng, split, grid=grid, origin=origin, plain=plain, crowded=crowded)
        for _ in range(size)
    ]
    digit, color, strokes = (np.stack(part) for part in zip(*map(_labels, scenes), strict=True))
    shown_colors = _shown(color, len(COLOURS))
    if plain:
        color[digit != 10] = -100
    pixels = np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2)
    text = _pack(rng, vocabulary, scenes)
    patch_rows, patch_cell = _places(grid, origin)
    return Batch(
        pixels=torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1),
        patch_positions=patch_rows,
        patch_digit=torch.from_numpy(digit),
        patch_color=torch.from_numpy(color),
        patch_strokes=torch.from_numpy(strokes),
        patch_cell=torch.where(torch.from_numpy(digit) == 10, GRID * GRID, patch_cell),
        shown_digits=_shown(digit, 10),
        shown_colors=shown_colors,
        **text,
    )


def _places(grid: int, origin: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    per_cell = CELL // PATCH
    side = GRID * per_cell
    rows = torch.arange(grid * per_cell) + origin[0] * per_cell
    columns = torch.arange(grid * per_cell) + origin[1] * per_cell
    index = (rows[:, None] * side + columns[None, :]).reshape(-1)
    cell = (rows[:, None] // per_cell * GRID + columns[None, :] // per_cell).reshape(-1)
    return torch.cat([torch.zeros(1, dtype=torch.long), index + 1]), cell


def _labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digit, colour and strokes of each patch."""
    index = patch_items(scene, PATCH)
    digit = np.array([*(item.digit for item in scene.items), 10])
    color = np.array([*(list(COLOURS).index(item.color) for item in scene.items), len(COLOURS)])
    strokes = np.stack([*(item.strokes for item in scene.items), np.zeros((8, 8), np.float32)])
    return digit[index], color[index], strokes[index].reshape(-1, 64)


def _shown(labels: np.ndarray, classes: int) -> torch.Tensor:
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
            tokens = [*ask, *answer[:-1]]
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


@lru_cache(maxsize=100_000)
def _ids(vocabulary: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(vocabulary(text, add_special_tokens=False).input_ids)
