"""The picture's pixels: kept patches are the image's own, dropped ones are faded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trio.demo.kept_picture import GAP, MARGIN, WRONG, ZOOM, Shown, answer, draw, main

SCHEDULE = "0:59,5:20"
ROW = "scene-0007-caption"
"""Which the model answers wrongly."""


def panels(picture: Image.Image, image: Image.Image, count: int) -> list[np.ndarray]:
    """The panels of the first row at the image's own size, [H, W, 3] each."""
    side = image.width * ZOOM
    lefts = [MARGIN + place * (side + GAP) for place in range(count)]
    cut = [picture.crop((left, MARGIN, left + side, MARGIN + side)) for left in lefts]
    return [np.asarray(one.resize(image.size, Image.Resampling.NEAREST), float) for one in cut]


def per_patch(difference: np.ndarray, patch: int) -> np.ndarray:
    """Mean absolute difference of each patch in row-major order, [N]."""
    rows, columns = difference.shape[0] // patch, difference.shape[1] // patch
    blocks = np.abs(difference).reshape(rows, patch, columns, patch, 3)
    return np.asarray(blocks.mean(axis=(1, 3, 4)).ravel())


@pytest.fixture(scope="module")
def shown() -> Shown:
    return answer([ROW], SCHEDULE)[0]


def test_kept_patches_are_as_in_the_image_and_others_faded(tmp_path: Path, shown: Shown) -> None:
    main([str(tmp_path / "kept.png"), "--rows", ROW, "--schedule", SCHEDULE])
    picture = Image.open(tmp_path / "kept.png").convert("RGB")
    (image,), kept_tokens = shown.request.images, shown.result.kept_tokens
    assert kept_tokens is not None
    assert [len(kept) for kept in kept_tokens] == [59, 20]
    whole, *stages = panels(picture, image, 3)
    assert per_patch(whole - np.asarray(image, float), 8).max() < 12
    for panel, kept in zip(stages, kept_tokens, strict=True):
        differs = per_patch(panel - np.asarray(image, float), 8)
        stays = np.array([token in kept for token in range(len(differs))])
        assert differs[stays].max() < 12
        assert differs[~stays].min() > 20


def test_a_wrong_answer_is_said_to_be_wrong(shown: Shown) -> None:
    assert shown.result.response not in shown.answers
    colors = {color for _, color in draw([shown], SCHEDULE).convert("RGB").getcolors(1 << 20) or ()}
    assert min(np.abs(np.array(list(colors)) - WRONG).sum(axis=1)) < 30


def test_a_row_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "kept.png"), "--rows", "scene-x"])
    assert "--rows scene-x: the bundled shard has scene-0000-caption" in capsys.readouterr().err
