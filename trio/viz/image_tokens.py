"""What a result's explanation says of one image of its request.

Shapes: V visual tokens of the image, before any reduction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trio.errors import UserError

if TYPE_CHECKING:
    from trio.engine.request import Explanation, Result


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageTokens:
    """One choice among the visual tokens of an image."""

    name: str
    """`encoder`, or `stage` and its number from 1 on."""
    kept: np.ndarray
    """`[V]` bool, of all tokens that there were at first."""
    saliency: np.ndarray | None
    """`[V]` float32, what it chose by, NaN for tokens that were gone; None where it has no scores
    of this image."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageTokens:
    """The visual tokens of one image, and what became of them."""

    boxes: np.ndarray
    """`[V, 4]` float32: left, top, right and bottom of what each shows, in widths and heights of
    the image; NaN where it shows no place."""
    stages: tuple[StageTokens, ...]
    """In the order in which they chose; empty where nothing was pruned."""


def image_tokens(result: Result, number: int = 0) -> ImageTokens:
    """The visual tokens of one image of a request.

    Args:
        result: of a `Request(explain=True)`.
        number: of the image in its request, from 0 on.

    Raises:
        UserError: the result has no explanation, or the request had no such image.
    """
    explanation = _explanation(result)
    counts = explanation.image_tokens
    if not 0 <= number < len(counts):
        there = f"images 0 to {len(counts) - 1}" if counts else "no image"
        raise UserError(f"number is {number!r}, and the request had {there}")
    first = sum(counts[:number])
    own = slice(first, first + counts[number])
    kept = result.kept_tokens or []
    names = [f"stage {place}" for place in range(1, 1 + len(result.visual_tokens_stages or ()))]
    ahead = ["encoder"] * (len(kept) - len(names))
    scores = [*[None] * len(ahead), *(explanation.saliency or [None] * len(names))]
    return ImageTokens(
        boxes=explanation.boxes[own],
        stages=tuple(
            StageTokens(
                name=name,
                kept=_mask(indices, sum(counts))[own],
                saliency=_known(None if saliency is None else saliency[own]),
            )
            for name, indices, saliency in zip([*ahead, *names], kept, scores, strict=True)
        ),
    )


def _explanation(result: Result) -> Explanation:
    if result.explanation is not None:
        return result.explanation
    if result.error is not None:
        raise UserError(f"this request failed, so that there is nothing to draw: {result.error}")
    raise UserError(
        "this result has no explanation; ask for one with trio.Request(..., explain=True)"
    )


def _mask(indices: Iterable[int | None], tokens: int) -> np.ndarray:
    """`[tokens]` bool; a tower's class token, None, is none of them."""
    mask = np.zeros(tokens, bool)
    mask[[index for index in indices if index is not None]] = True
    return mask


def _known(saliency: np.ndarray | None) -> np.ndarray | None:
    return None if saliency is None or np.isnan(saliency).all() else saliency
