"""Engines side by side on one model: images are encoded once, answers stay what they are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import mixed_requests
from tests.every_family.family import FAMILIES, Family
from tests.every_family.test_contexts import text_tower
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Result
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
    clock = iter(range(10**6))
    shared = first._runner._shared
    assert shared is not None
    monkeypatch.setattr(shared, "_now", lambda: float(next(clock)))
    requests = prepared(first, 8)
    said(first, requests)
    passes = next(clock) // 2
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
    said(first, requests)
    shared = first._runner._shared
    assert shared is not None and len(shared._found) == images(requests)
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
    assert not shared._found


def test_prepared_again_is_another_image(family: Family) -> None:
    first, second = engine(family, UNPRUNED).beside([TRIO])
    requests = prepared(first)
    said(first, requests)
    said(second, prepared(second))
    assert second.stats()["images_encoded"] == images(requests)


def test_an_engine_alone_shares_nothing(family: Family) -> None:
    alone = engine(family, TRIO)
    assert alone.beside([]) == [alone] and alone._runner._shared is None
    (request, *_) = prepared(alone)
    alone.release(request)


def test_the_memory_is_shared_out(family: Family) -> None:
    whole = engine(family, UNPRUNED, kv_bytes=1 << 24)
    budget = whole.memory_plan.kv_budget_bytes
    parts = [one.memory_plan.kv_budget_bytes for one in whole.beside([TRIO, FASTV])]
    assert max(parts) - min(parts) <= 0.01 * budget and 0.9 * budget < sum(parts) <= budget
