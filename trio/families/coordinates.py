"""Coordinates of visual tokens in their picture, and boxes of what each shows of it.

Shapes: N visual tokens of one image, R rows and C columns of a grid, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = -9.0
"""Both coordinates of what shows no place of the picture, as a tower's class token."""
Frame = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle, in widths and heights of an image; what lies outside
of 0 and 1 is padding."""
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)
Edges = tuple[Tensor, Tensor]
"""Where cells along one axis begin and where they end, `[C]` each."""
_LEAST = 1e-7
"""Share of an image's edge; what shows less of it lies beside it, but for rounding."""


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


def edges(cells: int, size: float) -> Edges:
    """Of cells of one size, side by side from 0 on."""
    edge = torch.arange(cells + 1, dtype=torch.float64) * size
    return edge[:-1], edge[1:]


def grid_boxes(rows: Edges, columns: Edges, newlines: bool = False) -> Tensor:
    """Boxes of the cells of a grid.

    Args:
        rows: downwards.
        columns: to the right.
        newlines: whether each row is followed by a token more, which shows no place.

    Returns:
        `[N, 4]` float64, row by row: left, top, right, bottom, in the units of the edges; NaN for
        newlines.
    """
    shape = len(rows[0]), len(columns[0])
    across = [edge.expand(shape) for edge in columns]
    down = [edge[:, None].expand(shape) for edge in rows]
    boxes_RC4 = torch.stack((across[0], down[0], across[1], down[1]), dim=-1)
    return F.pad(boxes_RC4, (0, 0, 0, int(newlines)), value=nan).flatten(0, 1)


def square_frame(width: int, height: int) -> Frame:
    """The square that processors of transformers pad an image of so many pixels to."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return -left / width, -top / height, (side - left) / width, (side - top) / height


def framed(boxes_N4: Tensor, frame: Frame) -> Tensor:
    """From widths and heights of a frame to those of the image that it is around, `[N, 4]`."""
    left, top, right, bottom = frame
    size = torch.tensor([right - left, bottom - top] * 2, dtype=torch.float64)
    return boxes_N4 * size + torch.tensor([left, top] * 2, dtype=torch.float64)


def in_image(boxes_N4: Tensor, frame: Frame | None) -> Tensor:
    """The same, as far as it lies in the image, float32; NaN for what shows nothing of it, and for
    all where the frame is unknown."""
    if frame is None:
        return torch.full_like(boxes_N4, nan, dtype=torch.float32)
    inside_N4 = framed(boxes_N4, frame).clamp(0, 1)
    size_N2 = inside_N4[:, 2:] - inside_N4[:, :2]
    # False of NaN too.
    shows_N = (size_N2 > _LEAST).all(dim=1)
    return inside_N4.where(shows_N[:, None], nan).float()


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
