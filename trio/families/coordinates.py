"""Coordinates of visual tokens in their picture.

Shapes: N visual tokens of one image, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor

OUTSIDE = -9.0
"""Both coordinates of what shows no place of the picture, as a tower's class token."""


def raster(rows: int, columns: int, aspect: float, newlines: bool = False) -> Tensor:
    """Middles of the cells that a picture is divided into.

    Args:
        rows: of cells.
        columns: of cells.
        aspect: the picture's height over its width.
        newlines: whether each row is followed by a token more, as a further column.

    Returns:
        `[N, 2]`, row by row; downwards and to the right, in edges of a square as large as the
        picture.
    """
    height, width = sqrt(aspect), 1 / sqrt(aspect)
    row = (_count(rows) + 0.5) * (height / max(1, rows))
    column = (_count(columns + newlines) + 0.5) * (width / max(1, columns))
    return torch.cartesian_prod(row, column)


def unknown(tokens: int) -> Tensor:
    """`[N, 2]`, all alike: of tokens of which nobody says where they lie."""
    return torch.zeros(tokens, 2, dtype=torch.float32)


def packed(
    lengths: Sequence[int],
    spans: Sequence[Sequence[tuple[int, int]]],
    images: Iterable[Tensor],
) -> Tensor:
    """Coordinates of all tokens of some prompts.

    Args:
        lengths: tokens of each prompt.
        spans: visual spans of each, in its own coordinates.
        images: `[N, 2]` of each span, in order.

    Returns:
        `[T, 2]`; zeros for text.
    """
    found_T2 = unknown(sum(lengths))
    own = iter(images)
    first = 0
    for length, row in zip(lengths, spans, strict=True):
        for start, _ in row:
            image_N2 = next(own)
            found_T2[first + start : first + start + len(image_N2)] = image_N2
        first += length
    return found_T2


def _count(number: int) -> Tensor:
    # Not in the default dtype, which may be half precision.
    return torch.arange(number, dtype=torch.float32)
