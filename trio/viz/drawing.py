"""Draws on the pixels that visual tokens show.

Shapes: V visual tokens of an image, H x W pixels of it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

FADED = (222, 226, 231)
GHOST = 0.25
"""How much darker than `FADED` a dropped token's pixel is, per step of its own brightness."""
OUTLINE = (9, 105, 218)
OUTLINE_SHARE = 0.6
LEAST_OUTLINED = 8
"""Pixels of a token's smaller edge, below which an outline would hide what it is around."""
HEAT = np.array(
    [
        (17, 4, 85),
        (61, 8, 115),
        (112, 13, 128),
        (163, 28, 121),
        (208, 56, 102),
        (243, 92, 71),
        (251, 147, 71),
        (253, 194, 103),
        (254, 237, 140),
    ],
    float,
)
"""From the lowest score to the highest, in equal steps of lightness as OKLab has it."""
HEAT_SHARE = 0.7
"""Of the colour in a pixel; the rest is the image in grey."""


def fade(
    image: Image.Image, boxes: np.ndarray, kept: np.ndarray, *, outlined: bool = False
) -> Image.Image:
    """The image with the pixels of kept tokens as they are and all others faded.

    Where several tokens show a pixel, as in tiles and in a view of the whole, one kept is enough.
    Pixels that no token shows, which the processor cut off, are faded too.

    Args:
        image: RGB, of any size.
        boxes: `[V, 4]`, as of `trio.Explanation`.
        kept: `[V]` bool.
        outlined: whether a line is drawn within what is kept, if tokens are large enough.
    """
    pixels = np.asarray(image, float)
    places = pixel_places(boxes, image.size)
    shown = np.zeros(pixels.shape[:2], bool)
    for left, top, right, bottom in places[kept & _there(boxes)]:
        shown[top:bottom, left:right] = True
    faded = np.where(shown[..., None], pixels, _faded(pixels))
    if outlined and _smallest_edge(places[_there(boxes)]) >= LEAST_OUTLINED:
        line = shown & ~_inner(shown)
        faded[line] += OUTLINE_SHARE * (np.array(OUTLINE) - faded[line])
    return _image(faded)


def heat(image: Image.Image, boxes: np.ndarray, saliency: np.ndarray) -> Image.Image:
    """The image in grey under colours of what its tokens were chosen by, by rank: from blue, the
    lowest, to yellow, the highest.

    Where several tokens show a pixel the highest counts; where none that has a score does, it is
    faded.

    Args:
        image: RGB, of any size.
        boxes: `[V, 4]`, as of `trio.Explanation`.
        saliency: `[V]`, NaN for tokens that were gone.
    """
    pixels = np.asarray(image, float)
    places = pixel_places(boxes, image.size)
    scored = _there(boxes) & ~np.isnan(saliency)
    level_V = ranks(saliency)
    level = np.full(pixels.shape[:2], np.nan)
    for token in sorted(np.flatnonzero(scored), key=level_V.__getitem__):
        left, top, right, bottom = places[token]
        level[top:bottom, left:right] = level_V[token]
    is_known = ~np.isnan(level)
    colored = _faded(pixels)
    grey = pixels.mean(axis=2)[is_known, None]
    colored[is_known] = HEAT_SHARE * heat_colors(level[is_known]) + (1 - HEAT_SHARE) * grey
    return _image(colored)


def ranks(scores: np.ndarray) -> np.ndarray:
    """`[V]`, from 0 of the lowest score to 1 of the highest; equal scores have equal ranks, and NaN
    stays."""
    found = np.full(len(scores), np.nan)
    known = ~np.isnan(scores)
    values, place = np.unique(scores[known], return_inverse=True)
    found[known] = place / max(1, len(values) - 1)
    return found


def heat_colors(level: np.ndarray) -> np.ndarray:
    """`[N, 3]`, colours of levels `[N]` from 0 to 1."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(level, steps, channel) for channel in HEAT.T], axis=-1)


def pixel_places(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[V, 4]` int, the boxes in whole pixels of an image of this width and height, at least one of
    each; boxes side by side stay so. Of a token that shows no place any."""
    width, height = size
    edges = np.nan_to_num(boxes.astype(float)) * (width, height, width, height)
    first, last = np.rint(edges[:, :2]).astype(int), np.rint(edges[:, 2:]).astype(int)
    first = np.minimum(first, (width - 1, height - 1))
    return np.concatenate([first, np.maximum(last, first + 1)], axis=1)


def _there(boxes: np.ndarray) -> np.ndarray:
    return ~np.isnan(boxes).any(axis=1)


def _smallest_edge(places: np.ndarray) -> float:
    """Of a usual token, in pixels."""
    return float(np.median((places[:, 2:] - places[:, :2]).min(axis=1))) if len(places) else 0.0


def _inner(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too; the image's edge counts as such."""
    padded = np.pad(mask, 1, constant_values=True)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _faded(pixels: np.ndarray) -> np.ndarray:
    return np.array(FADED) - GHOST * pixels.mean(axis=2, keepdims=True)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
