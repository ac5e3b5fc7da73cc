"""The LLaVA-NeXT adapter against the model's and the processor's own functions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.support import MANY_SIZES, picture
from tests.tiny.llava import (
    HUB_PINPOINTS,
    LLAVA_NEXT,
    PINPOINTS,
    tiny_llava,
    tiny_processor,
)
from trio.benchmark.shapes.sizes import blueprint
from trio.errors import UserError
from trio.families.llava_vision import TiledAdapter
from trio.families.registry import adapt

PROCESSOR = tiny_processor(patch_size=8, pinpoints=PINPOINTS)


@pytest.fixture(scope="module")
def adapter() -> TiledAdapter:
    return tiled(tiny_llava(layers=2, **LLAVA_NEXT))


def tiled(model: Any) -> TiledAdapter:
    adapter = adapt(model)
    assert isinstance(adapter, TiledAdapter)
    return adapter


PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]


def made(*pictures: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of these together, without the text."""
    texts = ["<image>"] * len(pictures)
    inputs = PROCESSOR(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "image_sizes")}


def singles() -> list[dict[str, torch.Tensor]]:
    return [made(picture) for picture in PICTURES]


def test_counts_of_a_7b_shape() -> None:
    adapter = tiled(blueprint("llava-next-7b"))
    assert adapter.largest_image == (672, 672)
    assert adapter.max_visual_tokens == 5 * 576 + 48 == 2928

    def counts(*heights_and_widths: tuple[int, int]) -> tuple[list[int], list[int]]:
        inputs = {"image_sizes": torch.tensor(heights_and_widths)}
        return adapter.visual_tokens(inputs), adapter.tiles(inputs)

    # Each row of features ends in a newline; 640 x 480 leaves 36 of 48 rows of its four tiles.
    tokens, tiles = counts((672, 672), (480, 640), (640, 480), (336, 1008), (1, 1), (10, 2000))
    assert tokens == [2928, 576 + 36 * 49, 576 + 48 * 37, 576 + 24 * 73, 576 + 24 * 25, 576]
    assert tiles == [5, 5, 5, 4, 3, 4]

    chance = random.Random(0)
    sides = [chance.randint(1, 2500) for _ in range(1500)]
    sizes = [(side, max(1, int(side * 200 ** chance.uniform(-1, 1)))) for side in sides]
    hubs = tiny_processor(image_size=336, patch_size=14, pinpoints=HUB_PINPOINTS)
    assert counts(*sizes)[0] == hubs._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert max(counts(*sizes)[0]) <= adapter.max_visual_tokens


def test_features_are_the_models_own_in_one_pass_without_padding(adapter: TiledAdapter) -> None:
    inputs = singles()
    passes: list[Any] = []
    tower = adapter.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    features = adapter.encode_images(inputs)
    hook.remove()
    tiles = [adapter.tiles(image)[0] for image in inputs]
    assert passes == [sum(tiles)] and len(set(tiles)) > 1

    batch = made(*PICTURES)
    assert batch["pixel_values"].shape[1] == max(tiles)
    with torch.no_grad():
        own = adapter.model.get_image_features(**batch, return_dict=True).pooler_output
    for one, other in zip(features, own, strict=True):
        assert torch.equal(one.tokens, other)
    counts = [len(image) for image in features]
    assert counts == [adapter.visual_tokens(image)[0] for image in inputs]
    assert adapter.visual_tokens(batch) == counts and adapter.tiles(batch) == tiles
    assert len(set(counts)) > 5 and max(counts) == adapter.max_visual_tokens == 88


def test_inputs_of_another_processor_are_refused(adapter: TiledAdapter) -> None:
    good = singles()[0]
    adapter.check_inputs(good)

    def fault(inputs: Mapping[str, torch.Tensor]) -> str:
        with pytest.raises(UserError) as caught:
            adapter.check_inputs(inputs)
        return str(caught.value)

    assert "without image_sizes" in fault({"pixel_values": good["pixel_values"]})
    assert "without pixel_values" in fault({"image_sizes": good["image_sizes"]})
    whole = {**good, "pixel_values": good["pixel_values"][:, 0]}
    assert "[1, 3, 32, 32], and the model takes [1, 5, 3, 32, 32]" in fault(whole)
    padded = {**good, "pixel_values": good["pixel_values"].repeat(1, 2, 1, 1, 1)}
    assert "[1, 10, 3, 32, 32], and the model takes [1, 5," in fault(padded)
