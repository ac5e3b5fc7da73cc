"""Engines side by side on one model: images are encoded once, answers stay what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.engine.support import mixed_requests
from tests.every_family.family import FAMILIES, Family
from tests.every_family.test_contexts import text_tower
from trio.decoder.stopwatch import Stopwatch
from trio.engine.engine import Engine
from trio.engine.request import ImageInputs, Prepared, Result
from trio.engine.sharing import shared_encoder
from trio.pruning.options import Pruning

UNPRUNED = Pruning(method="none", retention=1.0)
TRIO, FASTV = Pruning(retention=0.4), Pruning(retention=0.4, method="fastv")
EADP = Pruning(retention=0.25, method="eadp")
CDPRUNER = Pruning(retention=0.25, method="cdpruner")
REDUCED = Pruning(retention=0.4, encoder="visionzip")


@pytest.fixture(scope="module")
def family() -> Family:
    return FAMILIES["llava"]()


def engine(family: Family, pruning: Pruning, **options: Any) -> Engine:
    tower = text_tower(family.model)
    return Engine(family.model, family.processor, pruning=pruning, text_tower=tower, **options)


def prepared(engine: Engine, count: int = 6) -> list[Prepared]:
    found = [engine.prepare(request) for request in mixed_requests(count)]
    return [one for one in found if isinstance(one, Prepared)]


def images(requests: list[Prepared]) -> int:
    return sum(len(request.image_inputs) for request in requests)


def said(engine: Engine, requests: list[Prepared]) -> dict[Any, tuple[Any, ...]]:
    return {one.id: _essence(one) for one in engine.generate(requests)}


def _essence(result: Result) -> tuple[Any, ...]:
    assert result.error is None
    return result.token_ids, result.kept_tokens, result.retention, result.reading_flops


@pytest.mark.parametrize(
    "prunings",
    [
        (UNPRUNED, TRIO),
        (TRIO, FASTV, UNPRUNED),
        (UNPRUNED, EADP),
        (EADP, TRIO),
        (TRIO, EADP, CDPRUNER),
    ],
    ids=lambda prunings: ",".join(one.name for one in prunings),
)
def test_answers_are_those_of_engines_of_their_own(
    family: Family, prunings: tuple[Pruning, ...]
) -> None:
    first, *others = prunings
    made = engine(family, first).beside(others)
    requests = prepared(made[0])
    count = images(requests)
    assert count > 3
    for number, (one, pruning) in enumerate(zip(made, prunings, strict=True)):
        assert said(one, requests) == said(engine(family, pruning), requests)
        assert one.stats()["images_encoded"] == (0 if number else count)


def test_a_reduction_in_the_encoder_is_a_pass_of_its_own(family: Family) -> None:
    made = engine(family, UNPRUNED).beside([REDUCED, TRIO, REDUCED])
    requests = prepared(made[0])
    for one, pruning in zip(made, (UNPRUNED, REDUCED, TRIO, REDUCED), strict=True):
        assert said(one, requests) == said(engine(family, pruning), requests)
    count = images(requests)
    assert [one.stats()["images_encoded"] for one in made] == [count, count, 0, 0]


def test_what_is_spared_is_charged_all_the_same(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = engine(family, UNPRUNED).beside([TRIO])
    shared, passes = first._runner._encoder, 0

    class Seconds(Stopwatch):
        """A second each."""

        def __init__(self, device: torch.device) -> None:
            nonlocal passes
            passes += 1

        @contextmanager
        def running(self) -> Iterator[None]:
            yield

        def seconds(self) -> float:
            return 1.0

    monkeypatch.setattr(shared_encoder, "Stopwatch", Seconds)
    requests = prepared(first, 8)
    said(first, requests)
    assert 0 < passes <= images(requests) and shared.saved_s == 0
    said(second, requests)
    assert shared.saved_s == pytest.approx(passes), "a second each"
    assert second.stats()["encode_s"] >= passes > first.stats()["encode_s"]


def test_images_that_are_asked_about_again_are_not_read_again(family: Family) -> None:
    first, second = engine(family, UNPRUNED).beside([TRIO])
    requests = prepared(first)
    again = said(first, requests)
    assert said(first, requests) == again
    said(second, requests)
    assert first.stats()["images_encoded"] == images(requests)
    assert second.stats()["images_encoded"] == 0


def test_release_gives_the_images_back(family: Family) -> None:
    first, second = engine(family, UNPRUNED).beside([TRIO])
    requests = prepared(first)
    shared = first._runner._encoder
    shared._cache_bytes = 0
    said(first, requests)
    assert len(shared._found) == images(requests) and shared._bytes > 0
    half = [request for request in requests if request.image_inputs][:2]
    for request in half:
        second.release(request)
    left = images(requests) - images(half)
    assert len(shared._found) == left > 0
    said(second, requests)
    assert second.stats()["images_encoded"] == images(half)
    for request in requests:
        first.release(request)
        first.release(request)
    assert not shared._found and shared._bytes == 0


def test_an_image_is_known_by_its_content(family: Family) -> None:
    first, second = engine(family, UNPRUNED).beside([TRIO])
    requests = prepared(first)
    said(first, requests)
    again = prepared(second)
    assert not {id(i) for r in requests for i in r.image_inputs} & {
        id(i) for r in again for i in r.image_inputs
    }
    said(second, again)
    assert second.stats()["images_encoded"] == 0


def several_prompts(alone: Engine, prompts: int) -> list[Prepared]:
    """Each image with each prompt, images next to each other."""
    asked = [
        dataclasses.replace(request, id=(request.id, number), prompt=f"Question {number}?")
        for request in mixed_requests(8)
        for number in range(prompts)
    ]
    return [one for one in map(alone.prepare, asked) if isinstance(one, Prepared)]


@pytest.mark.parametrize("pruning", [UNPRUNED, TRIO, REDUCED, EADP], ids=lambda one: one.name)
def test_several_prompts_read_an_image_once(family: Family, pruning: Pruning) -> None:
    alone = engine(family, pruning, max_running=3)
    requests = several_prompts(alone, 3)
    together = said(alone, requests)
    assert alone.stats()["images_encoded"] == images(requests) // 3 > 0
    assert alone.stats()["encode_saved_s"] == 0, "it has not been spared them by another setting"
    one_by_one = engine(family, pruning)
    for request in requests:
        assert said(one_by_one, [request])[request.id] == together[request.id]
    assert one_by_one.stats()["images_encoded"] == images(requests), "a run begins without"


def test_what_was_read_last_is_kept_within_its_bytes(family: Family) -> None:
    alone = engine(family, UNPRUNED)
    requests = [one for one in prepared(alone, 12) if len(one.image_inputs) == 1]
    encoder = alone._runner._encoder
    inputs = [image for one in requests for image in one.image_inputs]
    encoder(inputs[:1])
    each = encoder._bytes
    assert each == encoder(inputs[:1])[0].tokens.nbytes > 0 and encoder.images == 1
    encoder._cache_bytes = 2 * each
    encoder(inputs[:3])
    assert encoder._bytes == 2 * each
    encoder(inputs[1:3])
    assert encoder.images == 3, "the last two are there"
    encoder(inputs[:1])
    encoder(inputs[2:3])
    assert encoder.images == 4
    encoder(inputs[1:2])
    assert encoder.images == 5, "the one that was read before the others is gone"


def test_other_pixels_are_another_image(family: Family) -> None:
    """And a mapping without a digest is an image of its own."""
    alone = engine(family, UNPRUNED)
    (one, other, *_) = [r for r in prepared(alone, 12) if len(r.image_inputs) == 1]
    (first,), (second,) = one.image_inputs, other.image_inputs
    assert isinstance(first, ImageInputs) and isinstance(second, ImageInputs)
    assert first.digest != second.digest
    plain = {**first}
    encoder = alone._runner._encoder
    encoder([first, plain, second, first, plain])
    assert encoder.images == 3


def test_the_memory_is_shared_out(family: Family) -> None:
    whole = engine(family, UNPRUNED, kv_bytes=1 << 24)
    budget = whole.memory_plan.kv_budget_bytes
    parts = [one.memory_plan.kv_budget_bytes for one in whole.beside([TRIO, FASTV])]
    assert max(parts) - min(parts) <= 0.01 * budget and 0.9 * budget < sum(parts) <= budget
