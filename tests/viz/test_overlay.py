"""Pixels of overlays, of explanations made by hand and of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trio
from trio.engine.request import Explanation, Result
from trio.errors import UserError
from trio.viz.drawing import FADED, HEAT, heat_colors, ranks
from trio.viz.panels import GAP, LINE, PAPER

ROWS, COLUMNS, CELL = 3, 4, 20
SIZE = COLUMNS * CELL, ROWS * CELL
NOWHERE = (np.nan,) * 4


def noise(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 120, shape, dtype=np.uint8))


def grid() -> list[tuple[float, ...]]:
    return [
        (column / COLUMNS, row / ROWS, (column + 1) / COLUMNS, (row + 1) / ROWS)
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]


def result(
    kept: Sequence[Sequence[int | None]],
    saliency: Sequence[Sequence[float]] = (),
    *,
    boxes: Sequence[Sequence[float]] | None = None,
    counts: Sequence[int] = (ROWS * COLUMNS,),
    stages: int | None = None,
    **more: Any,
) -> Result:
    own = grid() * len(counts) if boxes is None else boxes
    explanation = Explanation(
        image_tokens=tuple(counts),
        boxes=np.array(own, np.float32).reshape(-1, 4),
        saliency=tuple(np.array(scores, np.float32) for scores in saliency),
    )
    stages = len(kept) if stages is None else stages
    return Result(
        id=0,
        finish_reason="stop",
        kept_tokens=[list(own) for own in kept],
        visual_tokens_stages=[len(own) for own in kept[len(kept) - stages :]],
        explanation=explanation,
        **more,
    )


def panel(picture: Image.Image, column: int, row: int = 0, columns: int = 2) -> np.ndarray:
    """The pixels of a panel of SIZE, `[H, W, 3]`."""
    step = (picture.width - GAP) // columns
    left, top = GAP + column * step, GAP + row * (GAP + SIZE[1] + LINE)
    return np.asarray(picture.crop((left, top, left + SIZE[0], top + SIZE[1])), float)


def cell(pixels: np.ndarray, token: int, inset: int = 0) -> np.ndarray:
    row, column = divmod(token, COLUMNS)
    top, left = row * CELL + inset, column * CELL + inset
    return pixels[top : top + CELL - 2 * inset, left : left + CELL - 2 * inset]


def test_kept_tokens_are_as_they_were_and_dropped_ones_faded() -> None:
    image, kept = noise(), [1, 2, 6, 11]
    picture = trio.viz.overlay(image, result([kept]), panel=max(SIZE))
    whole = np.asarray(image, float)
    assert np.array_equal(panel(picture, 0), whole)
    shown = panel(picture, 1)
    for token in range(ROWS * COLUMNS):
        own, original = cell(shown, token, 1), cell(whole, token, 1)
        if token in kept:
            assert np.array_equal(own, original)
        else:
            assert np.abs(own - FADED).max() <= 0.25 * 120 + 1
            assert (own > original).all()
    # The outline is inside what is kept, and not between neighbours that both are.
    assert not np.array_equal(cell(shown, 11), cell(whole, 11))
    assert np.array_equal(cell(shown, 1)[5:15, -1], cell(whole, 1)[5:15, -1])
    assert np.abs(cell(shown, 0) - FADED).max() <= 0.25 * 120 + 1


def test_a_pixel_of_several_tokens_stays_if_one_of_them_does() -> None:
    boxes = [*grid(), (0.0, 0.0, 1.0, 0.5), NOWHERE]
    own = result([[4, 13], [12]], boxes=boxes, counts=(14,))
    picture = trio.viz.overlay(noise(), own, panel=max(SIZE))
    whole, first, second = (panel(picture, n, columns=3) for n in range(3))
    assert np.array_equal(cell(first, 4, 1), cell(whole, 4, 1))
    assert not np.array_equal(cell(first, 0, 1), cell(whole, 0, 1))
    assert np.array_equal(second[1:29, 1:-1], whole[1:29, 1:-1])
    assert (second[31:] > whole[31:]).all()


def test_saliency_is_drawn_by_rank_below_its_stage() -> None:
    scores = [0.001 * 10**token for token in range(12)]
    scores[3] = np.nan
    own = result([[9, 10, 11], [11]], [scores, [np.nan] * 12])
    picture = trio.viz.overlay(noise(), own, panel=max(SIZE))
    below = panel(picture, 1, 1, columns=3)
    color = [cell(below, token).mean(axis=(0, 1)) for token in range(12)]
    known = [own for token, own in enumerate(color) if token != 3]
    luminance = [own @ (0.2126, 0.7152, 0.0722) for own in known]
    assert luminance == sorted(luminance)
    assert np.abs(color[11] - HEAT[-1]).max() < 70 and np.abs(color[0] - HEAT[0]).max() < 40
    assert np.abs(cell(below, 3) - FADED).max() <= 0.25 * 120 + 1
    # The second stage has no scores of this image, the image itself never has.
    for column in (0, 2):
        assert (panel(picture, column, 1, columns=3)[:, :, :] == PAPER).all()


def test_colors_grow_lighter_and_equal_scores_are_alike() -> None:
    light = heat_colors(np.linspace(0, 1, 64)) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(light) > 0).all()
    found = ranks(np.array([5.0, np.nan, -np.inf, 5.0, 1e9]))
    assert np.array_equal(found, [0.5, np.nan, 0, 0.5, 1], equal_nan=True)
    assert np.array_equal(ranks(np.array([2.0, 2.0])), [0, 0])


def test_an_image_among_several_and_a_reduction_in_the_encoder() -> None:
    counts = (ROWS * COLUMNS,) * 2
    kept: list[list[int | None]] = [[None, 0, 12, 13, 20], [0, 13]]
    own = result(kept, [[np.nan] * 12 + [1.0] * 12], counts=counts, stages=1)
    first, second = (trio.viz.image_tokens(own, number) for number in (0, 1))
    assert [stage.name for stage in second.stages] == ["encoder", "stage 1"]
    assert [np.flatnonzero(stage.kept).tolist() for stage in second.stages] == [[0, 1, 8], [1]]
    assert [np.flatnonzero(stage.kept).tolist() for stage in first.stages] == [[0], [0]]
    assert first.stages[1].saliency is None and second.stages[0].saliency is None
    assert second.stages[1].saliency is not None
    assert trio.viz.overlay(noise(), own, number=1).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (1, 1), (3000, 37), (640, 480)])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_any_image_gives_a_picture_of_bounded_size(size: tuple[int, int], mode: str) -> None:
    kept = [[*range(11 - n)] for n in range(9)]
    own = result(kept, [[1.0] * 12] * 9)
    picture = trio.viz.overlay(noise(size).convert(mode), own, panel=200, width=900)
    assert picture.width <= 900 and picture.height <= 10 * 2 * (200 + GAP + LINE)
    narrow = trio.viz.overlay(noise(size), own, panel=200, width=1)
    assert narrow.width <= 200 + 2 * GAP


def test_nothing_pruned_is_the_image_alone() -> None:
    picture = trio.viz.overlay(noise(), result([]), panel=max(SIZE))
    assert np.array_equal(panel(picture, 0, columns=1), np.asarray(noise(), float))


def test_mistakes_are_told() -> None:
    image, own = noise(), result([[1]])
    plain = Result(id=0, finish_reason="stop")
    failed = Result(id=0, finish_reason="error", error="image: broken")
    text_only = result([], boxes=[], counts=())
    unknown = result([[1]], boxes=[NOWHERE] * 12)
    for arguments, message in [
        ((image, plain), r"no explanation; ask for one with trio.Request\(..., explain=True\)"),
        ((image, failed), "failed, so that there is nothing to draw: image: broken"),
        ((image, text_only), "number is 0, and the request had no image"),
        ((image, unknown), "nobody knows where the visual tokens of this image lie"),
        (("image.png", own), "the image is str, not a PIL image"),
    ]:
        with pytest.raises(UserError, match=message):
            trio.viz.overlay(*arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="number is 1, and the request had images 0 to 0"):
        trio.viz.overlay(image, own, number=1)
    with pytest.raises(UserError, match="number is -1"):
        trio.viz.overlay(image, own, number=-1)
    with pytest.raises(UserError, match="panel is 0; it must be from 1"):
        trio.viz.overlay(image, own, panel=0)
