"""Where each family says that its visual tokens lie, against where a picture was changed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import trio
from tests.every_family.family import LAYERS, Family, requests_with, skip_without
from tests.every_family.test_patch import batch
from trio.engine import model_runner as runner
from trio.engine.request import Request
from trio.families.coordinates import OUTSIDE, packed, raster, unknown
from trio.families.llava_onevision import LlavaOnevisionAdapter
from trio.families.registry import adapt
from trio.patching import forward
from trio.prefill import PackedPrompts

SIZES = [(96, 96), (120, 60), (50, 140)]
"""Widths and heights."""
SPOTS = [(0.2, 0.2), (0.8, 0.3), (0.5, 0.85)]
"""Rows and columns of the middle of what is changed, in shares of the picture."""


def pictures(size: tuple[int, int]) -> tuple[Image.Image, list[Image.Image]]:
    """A plain picture, and the same with a spot here and there."""
    width, height = size
    plain = np.full((height, width, 3), 90, np.uint8)
    spotted = []
    for row, column in SPOTS:
        own = plain.copy()
        y, x, edge = round(row * height), round(column * width), min(size) // 8
        own[max(0, y - edge) : y + edge, max(0, x - edge) : x + edge] = (250, 0, 160)
        spotted.append(Image.fromarray(own))
    return Image.fromarray(plain), spotted


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


@pytest.mark.parametrize(
    ("size", "others"),
    [*((size, 0) for size in SIZES), (SIZES[1], 1)],
    ids=["square", "wide", "tall", "wide-beside"],
)
def test_a_token_lies_where_the_picture_that_it_shows_does(
    any_family: Family, size: tuple[int, int], others: int
) -> None:
    if not any_family.per_image and size[0] != size[1]:
        pytest.skip("the processor crops it to a square")
    adapter = adapt(without_attention(any_family.model))
    plain, spotted = pictures(size)
    padded = others and isinstance(adapter, LlavaOnevisionAdapter)

    def seen(image: Image.Image) -> tuple[Tensor, Tensor]:
        images = [*[plain] * others, image]
        inputs = adapter.process_images(any_family.processor, images)[-1]
        (places,) = adapter.coordinates(inputs)
        (features,) = adapter.encode_images([inputs])
        assert [len(places)] == adapter.visual_tokens(inputs) == [len(features)]
        return features.tokens, places

    before, _ = seen(plain)
    width, height = size
    unit = (width * height) ** 0.5
    above = left = 0.0
    if padded:
        unit = max(size)
        above, left = (unit - height) / 2, (unit - width) / 2
    for (row, column), image in zip(SPOTS, spotted, strict=True):
        after, places = seen(image)
        changed = (after != before).any(dim=1)
        middle = torch.tensor([above + row * height, left + column * width]) / unit
        far = (places - middle).norm(dim=1)
        assert 0 < changed.sum() < 0.5 * len(places)
        assert far[changed].max() < 0.4
        assert far[changed].mean() < 0.5 * far[~changed].mean()


class Prefills:
    """What a module's `prefill` was given, call by call."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[PackedPrompts] = []
        own = module.prefill

        def prefill(decoder: Any, prompts: PackedPrompts, *args: Any) -> Any:
            self.prompts.append(prompts)
            return own(decoder, prompts, *args)

        monkeypatch.setattr(module, "prefill", prefill)

    def last(self) -> list[tuple[Tensor, Sequence[tuple[int, int]]]]:
        """Coordinates and visual spans of each prompt of the last call."""
        prompts = self.prompts[-1]
        assert prompts.coordinates_T2 is not None
        return list(
            zip(prompts.coordinates_T2.split(list(prompts.lengths)), prompts.images, strict=True)
        )


def expected_of(family: Family, request: Request, adapter: Any) -> list[Tensor]:
    made = adapter.process_images(family.processor, request.images)
    return [own for inputs in made for own in adapter.coordinates(inputs)]


@pytest.fixture
def model(family: Family) -> Any:
    return copy.deepcopy(family.model)


PATCHED = {
    "alone": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("side", "options"),
    [("left", "alone"), ("right", "beams"), ("right", "sampled")],
)
def test_patch_knows_the_places_of_each_rows_images(
    family: Family, model: Any, side: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = PATCHED[options]
    own = [0, 2, 1, 1]
    if more and not forward.repeats_by_prompt(model):
        own = [0, 1, 1]  # others are refused
    rows = requests_with(own)
    inputs = batch(family, rows, side)
    trio.patch(model, trio.Pruning(retention=0.4))
    seen = Prefills(forward, monkeypatch)
    model.generate(**inputs, **{"max_new_tokens": 2, "do_sample": False, **more})
    calls = [seen.last()]
    if not more:
        model(**inputs, logits_to_keep=1)
        calls.append(seen.last())
    adapter = adapt(model)
    for found in calls:
        copies = len(found) // len(rows)
        assert copies == (max(more.get("num_beams", 1), 2) if more else 1)
        for number, (places, spans) in enumerate(found):
            expected = expected_of(family, rows[number // copies], adapter)
            assert torch.equal(places, packed([len(places)], [spans], expected))


def test_who_calls_the_model_while_it_generates_has_its_own_places(
    family: Family, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers encodes no images ahead")
    outer, inner = batch(family, requests_with([1, 1])), batch(family, requests_with([0, 1])[1:])
    names = inspect.signature(model.get_image_features).parameters
    given = {name: inner.pop(name) for name in names if name in inner}
    if "mm_token_type_ids" in inner:
        grids = {name: given[name] for name in given if name != "pixel_values"}
        inner["position_ids"], _ = model.model.get_rope_index(**inner, **grids)
    inner["mm_encoder_outputs"] = {"image": model.get_image_features(**given)}
    trio.patch(model, trio.Pruning(retention=0.4))
    seen = Prefills(forward, monkeypatch)
    alone = model(**inner, logits_to_keep=1).logits
    logits = []

    def inside(ids: Tensor, scores: Tensor) -> Tensor:
        logits.append(model(**inner, logits_to_keep=1).logits)
        return scores

    model.generate(**outer, max_new_tokens=1, do_sample=False, logits_processor=[inside])
    ((places, _),) = seen.last()
    assert not places.any()
    assert torch.equal(logits[0], alone)


@pytest.mark.parametrize("encoder", ["none", "visionzip", "scan"])
def test_the_engine_knows_the_places_of_what_the_encoder_leaves(
    family: Family, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapt(family.model)
    skip_without(adapter, encoder)
    pruning = trio.Pruning(retention=0.2, encoder=encoder)
    worker = trio.Engine(family.model, family.processor, pruning=pruning, kv_bytes=1 << 26)
    requests = requests_with([2, 0, 1])
    seen = Prefills(runner, monkeypatch)
    assert all(result.error is None for result in worker.generate(requests))
    assert len(seen.prompts) == 1
    for request, (places, spans) in zip(requests, seen.last(), strict=True):
        left = []
        for inputs in adapter.process_images(family.processor, request.images):
            (given,) = adapter.coordinates(inputs)
            keep = worker._runner.pruning.encoded(len(given), LAYERS)
            (image,) = adapter.encode_images([inputs], encoder, [keep])
            outside = torch.full((1, 2), OUTSIDE)
            sources = image.sources or range(len(image))
            left.append(torch.cat([outside if n is None else given[n, None] for n in sources]))
        assert torch.equal(places, packed([len(places)], [spans], left))


@pytest.mark.parametrize("pruning", [{"method": "random"}, {"fill_up": "reference"}], ids=str)
def test_who_does_not_ask_for_places_has_them_not_worked_out(
    family: Family, model: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [Prefills(module, monkeypatch) for module in (forward, runner)]
    own = trio.Pruning(retention=0.4, **pruning)
    requests = requests_with([1])
    list(trio.Engine(model, family.processor, pruning=own, kv_bytes=1 << 26).generate(requests))
    trio.patch(model, own).generate(**batch(family, requests), max_new_tokens=1)
    assert [one.prompts[-1].coordinates_T2 for one in seen] == [None, None]


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
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert raster(2, 3, 1.0).dtype == unknown(2).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert raster(0, 3, 0.01).shape == raster(3, 0, 9.0).shape == (0, 2)
    assert raster(3, 0, 9.0, newlines=True).shape == (3, 2)


def test_packed_prompts_have_zeros_for_text() -> None:
    first, second = raster(1, 2, 1.0), raster(1, 1, 1.0)
    got = packed([4, 3], [[(1, 3)], [(0, 1)]], [first, second])
    assert rows_of(got) == [[0, 0], *rows_of(first), [0, 0], *rows_of(second), [0, 0], [0, 0]]
