"""Where each family says that its visual tokens lie, against where a picture was changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.families.family import Family
from trio.engine.entry import coordinates
from trio.models.raster import OUTSIDE, packed, raster
from trio.models.registry import adapt

SIZES = [(96, 96), (120, 60), (50, 140)]
"""Widths and heights."""
SPOTS = [(0.2, 0.2), (0.8, 0.3), (0.5, 0.85)]
"""Rows and columns of the middle of what is changed, in shares of the picture."""


def pictures(size: tuple[int, int], count: int = 1) -> tuple[list[Image.Image], list[Image.Image]]:
    """The same picture, and with a spot in the last one."""
    width, height = size
    plain = np.full((height, width, 3), 90, np.uint8)
    spotted = []
    for row, column in SPOTS:
        own = plain.copy()
        y, x, edge = round(row * height), round(column * width), min(size) // 8
        own[max(0, y - edge) : y + edge, max(0, x - edge) : x + edge] = (250, 0, 160)
        spotted.append(Image.fromarray(own))
    return [Image.fromarray(plain)] * count, spotted


def without_attention(model: Any) -> Any:
    """A copy whose tower keeps patches apart."""
    own = copy.deepcopy(model)
    found = 0
    for name, parameter in own.named_parameters():
        ends_attention = "attn.out_proj" in name or "attn.proj" in name
        if ("vision_tower" in name or "visual" in name) and ends_attention:
            parameter.data.zero_()
            found += 1
    assert found
    return own


@pytest.mark.parametrize("size", SIZES)
def test_a_token_lies_where_the_picture_that_it_shows_does(
    any_family: Family, size: tuple[int, int]
) -> None:
    if not any_family.per_image and size[0] != size[1]:
        pytest.skip("the processor crops it to a square")
    adapter = adapt(without_attention(any_family.model))
    plain, spotted = pictures(size)

    def seen(image: Image.Image) -> tuple[Tensor, Tensor]:
        (inputs,) = adapter.process_images(any_family.processor, [image])
        (places,) = adapter.coordinates(inputs)
        (features,) = adapter.encode_images([inputs])
        assert [len(places)] == adapter.visual_tokens(inputs) == [len(features)]
        return features.tokens, places

    before, _ = seen(plain[0])
    unit = (size[0] * size[1]) ** 0.5
    for (row, column), image in zip(SPOTS, spotted, strict=True):
        after, places = seen(image)
        changed = (after != before).any(dim=1)
        middle = torch.tensor([row * size[1], column * size[0]]) / unit
        far = (places - middle).norm(dim=1)
        assert 0 < changed.sum() < 0.5 * len(places)
        assert far[changed].max() < 0.4
        assert far[changed].mean() < 0.5 * far[~changed].mean()


def test_images_beside_others_have_their_own_places(family: Family) -> None:
    adapter = adapt(family.model)
    images, _ = pictures(SIZES[0], 2)
    made = adapter.process_images(family.processor, images)
    for inputs in made:
        (places,) = adapter.coordinates(inputs)
        assert [len(places)] == adapter.visual_tokens(inputs)
        assert len({tuple(place) for place in places.tolist()}) > len(places) // 2


def test_what_a_reduction_leaves_lies_where_it_came_from(family: Family) -> None:
    adapter = adapt(family.model)
    for encoder in adapter.encoders:
        images, _ = pictures(SIZES[0])
        (inputs,) = adapter.process_images(family.processor, images)
        (given,) = adapter.coordinates(inputs)
        (reduced,) = adapter.encode_images([inputs], encoder, [len(given) // 2])
        left = coordinates(given, reduced)
        assert len(left) == len(reduced) == len(given) // 2
        for place, source in zip(left, reduced.sources, strict=True):
            expected = torch.full((2,), OUTSIDE) if source is None else given[source]
            assert torch.equal(place, expected)


def rows_of(places: Tensor) -> Sequence[Sequence[float]]:
    return [[round(number, 4) for number in place] for place in places.tolist()]


def test_a_raster_is_in_edges_of_a_square_as_large() -> None:
    assert rows_of(raster(1, 2, 0.25)) == [[0.25, 0.5], [0.25, 1.5]]
    assert rows_of(raster(2, 1, 1.0, newlines=True)) == [
        [0.25, 0.5],
        [0.25, 1.5],
        [0.75, 0.5],
        [0.75, 1.5],
    ]
    assert raster(0, 3, 0.01).shape == raster(3, 0, 9.0).shape == (0, 2)
    assert raster(3, 0, 9.0, newlines=True).shape == (3, 2)


def test_packed_prompts_have_zeros_for_text() -> None:
    first, second = raster(1, 2, 1.0), raster(1, 1, 1.0)
    got = packed([4, 3], [[(1, 3)], [(0, 1)]], [first, second])
    assert rows_of(got) == [[0, 0], *rows_of(first), [0, 0], *rows_of(second), [0, 0], [0, 0]]
