"""Panels side by side: an image, what each stage kept of it, and what it chose by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trio.errors import UserError
from trio.viz.drawing import fade, heat
from trio.viz.image_tokens import ImageTokens, StageTokens, image_tokens

if TYPE_CHECKING:
    from trio.engine.request import Result

GAP, LINE, TEXT = 16, 24, 14
"""Pixels between panels, of a caption's line, and its letters' size."""
PAPER, INK = (255, 255, 255), (89, 99, 110)
LONGEST_PANEL = 2048
Panel = tuple[Image.Image, str]
"""With its caption."""


def overlay(
    image: Image.Image, result: Result, *, number: int = 0, panel: int = 320, width: int = 1600
) -> Image.Image:
    """Draw which visual tokens of an image each stage kept.

    The panels are the image; for each stage, first that of the encoder if it reduced the tokens,
    the image with the pixels of dropped tokens faded and those of kept ones as they are; and below
    each the image under colours of what the stage chose by, from blue, the lowest, to yellow, the
    highest rank, where the method has scores. What the model never saw of an image, as its
    processor cut it off, is faded.

    Args:
        image: as it was given in the request.
        result: of a `Request(explain=True)`.
        number: of the image in its request, from 0 on.
        panel: pixels of a panel's longer edge, at most 2048.
        width: pixels of the picture, behind which panels go on below; one panel always fits.

    Returns:
        An RGB image.

    Raises:
        UserError: there is no explanation or no such image, nobody knows where its tokens lie, or a
            setting is out of bounds.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"the image is {type(image).__name__}, not a PIL image")
    if not 1 <= panel <= LONGEST_PANEL:
        raise UserError(f"panel is {panel!r}; it must be from 1 to {LONGEST_PANEL} pixels")
    tokens = image_tokens(result, number)
    if np.isnan(tokens.boxes).all():
        raise UserError(
            "nobody knows where the visual tokens of this image lie: the adapter of its model has "
            "no `boxes`, or the processor resizes or pads in a way that `frame` does not know"
        )
    shown = _scaled(image.convert("RGB"), panel)
    columns = [_column(shown, tokens, stage) for stage in tokens.stages]
    return _laid_out([[(shown, f"{len(tokens.boxes)} visual tokens")], *columns], width)


def _scaled(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _column(shown: Image.Image, tokens: ImageTokens, stage: StageTokens) -> list[Panel]:
    """What a stage kept, and below it what it chose by."""
    boxes = tokens.boxes
    kept = f"{stage.name}: {stage.kept.sum()} of {len(boxes)} kept"
    panels = [(fade(shown, boxes, stage.kept, outlined=True), kept)]
    if stage.saliency is not None:
        panels.append((heat(shown, boxes, stage.saliency), f"{stage.name}: saliency by rank"))
    return panels


def _laid_out(columns: Sequence[Sequence[Panel]], width: int) -> Image.Image:
    """Columns of panels from left to right, and on below where they do not fit."""
    font = ImageFont.load_default(TEXT)
    captions = [font.getlength(caption) for column in columns for _, caption in column]
    shown, _ = columns[0][0]
    step_x = GAP + max(shown.width, math.ceil(max(captions)))
    step_y = GAP + shown.height + LINE
    fit = min(len(columns), max(1, (width - GAP) // step_x))
    bands = [columns[first : first + fit] for first in range(0, len(columns), fit)]
    heights = [max(map(len, band)) for band in bands]
    paper = Image.new("RGB", (GAP + fit * step_x, GAP + sum(heights) * step_y), PAPER)
    pen = ImageDraw.Draw(paper)
    down = 0
    for band, height in zip(bands, heights, strict=True):
        for across, column in enumerate(band):
            for place, (panel, caption) in enumerate(column):
                left, top = GAP + across * step_x, GAP + (down + place) * step_y
                paper.paste(panel, (left, top))
                pen.text((left, top + panel.height + 4), caption, fill=INK, font=font)
        down += height
    return paper
