"""Scenes of coloured handwritten digits, with questions and a caption that have one right answer.

A scene is a grid of 64-pixel cells, three by three at full size, over a textured background. One to
four cells hold a handwritten digit (scikit-learn's `load_digits`, 8 x 8 pixels, enlarged and
slightly turned); no two digits of a scene share their value or their colour. The handwritten
samples are split once into train and held-out, so a held-out scene shows strokes that the training
never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

from trio.errors import UserError

CELL = 64
"""Side of a grid cell in pixels."""
GRID = 3
"""Cells along one side of a full scene: 192 x 192 pixels."""
MAX_OBJECTS = 4
SIZES = (40, 48, 56)
"""Sides of a digit's box in pixels."""
STEP = 8
"""Boxes start at multiples of this many pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 70, 60),
    "green": (60, 220, 80),
    "blue": (80, 130, 255),
    "yellow": (250, 225, 60),
    "purple": (200, 90, 240),
    "white": (245, 245, 245),
}
CELL_NAMES = (
    "top-left", "top-center", "top-right",
    "middle-left", "center", "middle-right",
    "bottom-left", "bottom-center", "bottom-right",
)  # fmt: skip
KINDS = ("digit", "color", "presence", "count", "position", "caption")
Kind = Literal["digit", "color", "presence", "count", "position", "caption"]
Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """One digit of a scene."""

    digit: int
    color: str
    cell: int
    """Row-major index in the full 3 x 3 grid."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the rendered image."""
    strokes: np.ndarray
    """[8, 8] in 0…1: the handwritten sample, before enlarging and turning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """An image and what it shows, items in the order of `COLOURS`."""

    pixels: np.ndarray
    """[height, width, 3] uint8, RGB."""
    items: tuple[Item, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    kind: Kind
    prompt: str
    answer: str


@cache
def handwriting(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Strokes [N, 8, 8] in 0…1 and their digits [N]; every fifth sample is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "scenes are made of the digits that come with scikit-learn: "
            "pip install 'trio-vlm[scenes]', or in a clone pip install -e '.[scenes]'"
        ) from None
    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 0
    chosen = held_out if split == "heldout" else ~held_out
    return (data.images[chosen] / 16.0).astype(np.float32), data.target[chosen]


def make_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    grid: int = GRID,
    origin: tuple[int, int] = (0, 0),
    plain: bool = False,
    crowded: bool = False,
) -> Scene:
    """Draw a scene of `grid` x `grid` cells whose first cell is `origin` (row, column) of the full
    grid; training uses parts of the full grid because they cost less. A plain scene, for the first
    steps of training, shows all digits in white on an even ground; a crowded one always shows as
    many digits as there may be."""
    canvas = _ground(rng, grid * CELL)
    if not plain:
        canvas += _texture(rng, grid * CELL)
    most = min(MAX_OBJECTS, grid * grid)
    count = most if crowded else int(rng.integers(1, most + 1))
    digits = rng.permutation(10)[:count]
    colors = sorted(rng.permutation(len(COLOURS))[:count])
    cells = rng.permutation(grid * grid)[:count]
    items = []
    for digit, color, cell in zip(digits, colors, cells, strict=True):
        row, column = divmod(int(cell), grid)
        name = list(COLOURS)[color]
        samples, labels = handwriting(split)
        strokes = samples[rng.choice(np.flatnonzero(labels == digit))]
        tint = "white" if plain else name
        box = _draw_digit(rng, canvas, strokes, tint, row * CELL, column * CELL)
        full_cell = (origin[0] + row) * GRID + origin[1] + column
        items.append(Item(digit=int(digit), color=name, cell=full_cell, box=box, strokes=strokes))
    return Scene(pixels=canvas.clip(0, 255).astype(np.uint8), items=tuple(items))


def questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Every kind at least once: a question about each digit and colour, one of presence that is
    true and one that is not, the count, and the caption."""
    asked = [caption(scene), Question(
        kind="count", prompt="how many digits are there ?", answer=str(len(scene.items))
    )]  # fmt: skip
    for item in scene.items:
        asked += [
            Question(kind="digit", prompt=f"which digit is {item.color} ?", answer=str(item.digit)),
            Question(kind="color", prompt=f"what color is the {item.digit} ?", answer=item.color),
            Question(
                kind="position",
                prompt=f"where is the {item.digit} ?",
                answer=CELL_NAMES[item.cell],
            ),
        ]
    shown = [item.digit for item in scene.items]
    absent = [digit for digit in range(10) if digit not in shown]
    for digits, answer in ((shown, "yes"), (absent, "no")):
        prompt = f"is there a {rng.choice(digits)} ?"
        asked.append(Question(kind="presence", prompt=prompt, answer=answer))
    return asked


def caption(scene: Scene) -> Question:
    """The caption names every digit with its colour, in the order of `COLOURS`."""
    text = listed([f"a {item.color} {item.digit}" for item in scene.items])
    return Question(kind="caption", prompt="describe the image .", answer=text)


def listed(names: list[str]) -> str:
    """One, two or more names: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def patch_items(scene: Scene, patch: int) -> np.ndarray:
    """For each patch [rows * columns] the index of the item whose box covers its centre, or -1."""
    side = scene.pixels.shape[0] // patch
    index = np.full((side, side), -1)
    centres = (np.arange(side) + 0.5) * patch
    for number, item in enumerate(scene.items):
        left, top, right, bottom = item.box
        rows = (centres >= top) & (centres < bottom)
        columns = (centres >= left) & (centres < right)
        index[rows[:, None] & columns[None, :]] = number
    return index.reshape(-1)


def _draw_digit(
    rng: np.random.Generator,
    canvas: np.ndarray,
    strokes: np.ndarray,
    color: str,
    top: int,
    left: int,
) -> tuple[int, int, int, int]:
    size = int(rng.choice(SIZES))
    ink = Image.fromarray((strokes * 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    turned = ink.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    alpha = (np.asarray(turned, np.float32) / 255 * 1.4).clip(0, 1)[..., None]
    top += STEP * int(rng.integers(0, (CELL - size) // STEP + 1))
    left += STEP * int(rng.integers(0, (CELL - size) // STEP + 1))
    tint = np.array(COLOURS[color], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
    area = canvas[top : top + size, left : left + size]
    area[:] = area * (1 - alpha) + tint * alpha
    return left, top, left + size, top + size


def _ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dark, even ground with fine grain."""
    base = (rng.uniform(8, 45) + rng.normal(0, 5, 3)).astype(np.float32)
    return base + rng.integers(-6, 7, (side, side, 1)).astype(np.float32)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise, stripes or checks, [side, side, 1], around 0."""
    amplitude = float(rng.uniform(4, 16))
    kind = rng.integers(3)
    if kind == 0:
        coarse = rng.uniform(0, 255, (int(rng.integers(3, 10)),) * 2).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        return (np.asarray(smooth, np.float32)[..., None] / 127.5 - 1) * amplitude
    wave = 2 * np.pi / float(rng.uniform(10, 48))
    angle = float(rng.uniform(0, np.pi))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    waves = np.sin((x * np.cos(angle) + y * np.sin(angle)) * wave)
    if kind == 2:
        waves = np.sign(waves * np.sin((y * np.cos(angle) - x * np.sin(angle)) * wave))
    return waves[..., None] * amplitude
