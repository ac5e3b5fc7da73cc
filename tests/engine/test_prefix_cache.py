"""Several questions on one image: the layers before the first stage see the image once, and every
answer is what it is without that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import MANY_SIZES, by_id, picture
from tests.engine.test_engine import as_on_a_gpu
from tests.every_family.family import ARCHITECTURES, FAMILIES, LAYERS, Family
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.engine.sharing.prefix_cache import PrefixCache, part_for_images
from trio.pruning.options import Pruning

QUESTIONS = ("what is this", "how many", "describe the picture please", "where is red ?")
IMAGES = 4


_QUICK = ("llava", "qwen3_vl")
_ANY = [pytest.param(one, marks=[pytest.mark.slow] * (one not in _QUICK)) for one in ARCHITECTURES]


@pytest.fixture(scope="module", params=_ANY)
def family(request: Any) -> Family:
    found: Family = FAMILIES[request.param]()
    return found


def engine(family: Family, pruning: Pruning, **options: Any) -> Engine:
    given = {"kv_bytes": 1 << 28, **options}
    return Engine(family.model, family.processor, pruning=pruning, **given)


def questions(images: int = IMAGES, album: int = 1) -> Iterator[Request]:
    """Four on each image, or on each album of so many; one prompt without an image between them."""
    for number in range(images):
        shown = tuple(
            picture(number + 7 * place, MANY_SIZES[(number + place) % len(MANY_SIZES)])
            for place in range(album)
        )
        for place, prompt in enumerate(QUESTIONS):
            sampling = Sampling(max_new_tokens=3 + place, ignore_eos=True)
            yield Request(prompt=prompt, images=shown, id=(number, place), sampling=sampling)
        yield Request(prompt="how many", id=(number, "text"), sampling=Sampling(max_new_tokens=4))


def answers(results: Sequence[Result]) -> dict[Any, Any]:
    assert not [result.error for result in results if result.error]
    return {one.id: (one.token_ids, one.kept_tokens, one.candidate_logprobs) for one in results}


def both(
    family: Family, pruning: Pruning, requests: Sequence[Request], **options: Any
) -> dict[str, Any]:
    """Holds shared answers against unshared ones; the counters of the former."""
    shared = engine(family, pruning, **options)
    alone = engine(family, pruning, share_images=False, **options)
    expected = answers(list(alone.generate(requests)))
    assert alone.stats()["image_layers"] == alone.stats()["shared_prompts"] == 0
    assert answers(list(shared.generate(requests))) == expected
    return shared.stats()


@pytest.mark.parametrize("first", [0, 1, 4])
def test_answers_are_those_of_unshared_images(family: Family, first: int) -> None:
    stats = both(family, Pruning(schedule=f"{first}:0.4"), list(questions()))
    assert stats["image_layers"] == first * IMAGES
    assert stats["shared_prompts"] == (3 * IMAGES if first else 0)
    assert stats["images_encoded"] == IMAGES


def test_without_pruning_all_layers_are_shared(family: Family) -> None:
    stats = both(family, Pruning(), list(questions()), max_running=3)
    assert stats["image_layers"] == LAYERS * IMAGES


def test_over_many_small_batches(family: Family) -> None:
    """Prompts on one image mostly do not come into one batch."""
    stats = both(
        family, Pruning(schedule="2:0.4"), list(questions()), batch_tokens=1, max_running=3
    )
    assert stats["image_layers"] == 2 * IMAGES


def test_albums_are_shared_as_a_whole(family: Family) -> None:
    stats = both(family, Pruning(schedule="2:0.4,4:0.2"), list(questions(2, album=2)))
    assert stats["image_layers"] == 2 * 2 * 2


@pytest.mark.parametrize(
    ("pruning", "depth"),
    [
        pytest.param(Pruning(schedule="3:0.4", method="fastv"), 2, id="fastv looks a layer back"),
        pytest.param(Pruning(retention=0.4, method="divprune"), 0, id="divprune chooses first"),
        pytest.param(Pruning(schedule="0:0.5,2:0.2", encoder="visionzip"), 2, id="reduced"),
    ],
)
def test_by_method(pruning: Pruning, depth: int) -> None:
    """No deeper than the method lets it."""
    stats = both(FAMILIES["llava"](), pruning, list(questions()))
    assert stats["image_layers"] == depth * IMAGES


def test_candidates_are_scored_alike(family: Family) -> None:
    scored = [
        Request(prompt=one.prompt, images=one.images, id=one.id, candidates=(" a", " b c"))
        for one in questions(2)
    ]
    shared, alone = (engine(family, Pruning(schedule="2:0.4"), share_images=on) for on in (1, 0))
    found, expected = by_id(shared.generate(scored)), by_id(alone.generate(scored))
    for key, one in expected.items():
        for own, other in zip(found[key].candidate_logprobs, one.candidate_logprobs, strict=True):
            assert own == pytest.approx(other, abs=1e-4)
    assert shared.stats()["shared_prompts"] == 6


def test_states_stay_within_their_memory() -> None:
    """What was used longest ago goes first, and a small memory keeps none over batches."""
    family = FAMILIES["llava"]()
    options = {"batch_tokens": 1, "max_running": 1}
    large = engine(family, Pruning(schedule="2:0.4"), **options)
    list(large.generate(questions()))
    prefixes = large._runner.prefixes
    left = large.memory_plan.kv_budget_bytes
    assert prefixes.budget == part_for_images(1 << 28)
    assert left + prefixes.budget == pytest.approx(1 << 28, rel=1e-3)
    small = engine(
        family, Pruning(schedule="2:0.4"), batch_tokens=1, max_running=1, kv_bytes=1 << 26
    )
    list(small.generate(questions()))
    assert small._runner.prefixes.budget == 0
    assert small.stats()["image_layers"] == 2 * 4 * IMAGES


def test_the_oldest_states_go_first() -> None:
    worker = engine(FAMILIES["llava"](), Pruning(schedule="2:0.4"), batch_tokens=1, max_running=1)
    prefixes: PrefixCache = worker._runner.prefixes
    requests = list(questions(3))
    for request in requests:
        worker.submit(request)
    while worker.has_work:
        worker.step()
    sizes = [states.nbytes for states in prefixes._found.values()]
    assert len(sizes) == 3 and sum(sizes) <= prefixes.budget
    kept = list(prefixes._found)[1:]
    prefixes.budget = sum(sizes[1:])
    prefixes.done()
    assert list(prefixes._found) == kept
    worker.reset()
    assert not prefixes._found


@pytest.mark.parametrize("schedule", ["2:0.4,4:0.2", None])
def test_the_ways_of_a_gpu_share_alike(schedule: str | None) -> None:
    family, requests = FAMILIES["llava"](), list(questions(3))
    pruning = Pruning(schedule=schedule)
    expected = answers(list(engine(family, pruning, share_images=False).generate(requests)))
    shared = as_on_a_gpu(engine(family, pruning, max_running=5))
    assert answers(list(shared.generate(requests))) == expected
    assert shared.stats()["shared_prompts"] == 9


def test_what_is_not_finite_behind_an_image_stays_there() -> None:
    family = FAMILIES["llava"]()
    worker = engine(family, Pruning())
    asked = [one for one in questions(1) if one.images]
    made = [worker.prepare(one) for one in asked]
    prepared = [one for one in made if isinstance(one, Prepared)]
    others = {token for one in prepared[:1] + prepared[2:] for token in one.input_ids}
    word = next(token for token in prepared[1].input_ids if token not in others)
    with torch.no_grad():
        family.model.model.language_model.embed_tokens.weight[word] = math.nan
    found = by_id(worker.generate(prepared))
    assert worker.stats()["shared_prompts"] == 3
    assert [key for key, one in found.items() if one.error] == [prepared[1].id]


def test_weights_that_change_between_requests_are_followed() -> None:
    family = FAMILIES["llava"]()
    worker = engine(family, Pruning())
    requests = [replace(one, sampling=Sampling(max_new_tokens=6)) for one in questions(1)]
    before = answers(list(worker.generate(requests)))
    head = family.model.lm_head.weight
    head.data.copy_(head.flip(0))
    after = answers(list(worker.generate(requests)))
    assert after != before
    assert after == answers(list(engine(family, Pruning()).generate(requests)))


def test_engines_beside_each_other_share_all_memory() -> None:
    pruning = Pruning(schedule="2:0.4")
    whole = engine(FAMILIES["llava"](), pruning, kv_bytes=1 << 30)
    parts = whole.beside([Pruning(schedule="3:0.4")])
    given = sum(one._cache.allocated_bytes + one._runner.prefixes.budget for one in parts)
    assert given == pytest.approx(1 << 30, rel=1e-3)


def test_a_batch_leaves_no_more_than_its_memory_holds() -> None:
    """Prompts whose states find no place go through all layers themselves."""
    family = FAMILIES["llava"]()
    stats = both(family, Pruning(schedule="4:0.4"), list(questions()), kv_bytes=1 << 20)
    assert 4 * IMAGES < stats["image_layers"] < 4 * 4 * IMAGES
