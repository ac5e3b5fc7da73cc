"""The engine with a reduction in the encoder, before any method in the decoder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.engine.support import MANY_SIZES, assert_lively, by_id, picture, tokens
from tests.every_family.family import FAMILIES, LAYERS, Family, requests_of_many_sizes
from tests.every_family.test_engine import engine
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.families.registry import adapt
from trio.pruning.options import Pruning

LLAVAS = [
    ("llava", "visionzip"),
    ("llava_next", "scan"),
    ("llava", "scope"),
    ("llava_next", "prunesid"),
]
REDUCED = [*LLAVAS, ("qwen2_5_vl", "scan"), ("qwen3_vl", "scan")]
METHODS = ("trio", pytest.param("none", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def family(request: Any) -> Family:
    return FAMILIES[request.param]()


def reduced(encoder: str, method: str) -> Pruning:
    return Pruning(retention=1 / 4, encoder=encoder, method=method, seed=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "encoder"), REDUCED, indirect=["family"])
def test_a_batch_answers_as_its_requests_alone(family: Family, encoder: str, method: str) -> None:
    requests = requests_of_many_sizes(6, seed=2, max_new_tokens=8)
    pruning = reduced(encoder, method)
    late = by_id(engine(family, pruning, max_running=5, batch_tokens=150).generate(requests))
    worker = engine(family, pruning)
    for request in requests:
        (alone,) = worker.generate([request])
        together = late[request.id]
        assert together.token_ids == alone.token_ids
        assert together.kept_tokens == alone.kept_tokens
        prepared = worker.prepare(request)
        assert isinstance(prepared, Prepared)
        assert_as_settled(worker._runner.pruning, prepared, alone)
    assert_lively({key: result.token_ids for key, result in late.items()})


def assert_as_settled(pruning: Pruning, prepared: Prepared, result: Result) -> None:
    """Counts of each image, as the settings have them, and retention within a token of each."""
    counts = prepared.image_tokens
    if not counts:
        assert (result.visual_tokens, result.kept_tokens) == (0, [])
        return
    stages = [pruning.stages(count, LAYERS) for count in counts]
    entered = [pruning.encoded(count, LAYERS) for count in counts]
    assert result.visual_tokens == sum(counts)
    assert result.visual_tokens_encoder == sum(entered)
    kept = [sum(stage[1] for stage in at) for at in zip(*stages, strict=True)]
    assert result.visual_tokens_stages == kept
    assert result.retention is not None
    assert abs(result.retention - 1 / 4) * sum(counts) <= len(counts)

    assert result.kept_tokens is not None
    first, *later = result.kept_tokens
    places = [place for place in first if place is not None]
    assert len({*places}) == len(places) and {*places} <= {*range(sum(counts))}
    starts = [*itertools.accumulate(counts, initial=0)]
    if None not in first:
        for start, count, left in zip(starts, counts, entered, strict=False):
            assert sum(start <= place < start + count for place in places) == left
    assert [len(stage) for stage in later] == kept
    for before, after in itertools.pairwise([first, *later]):
        assert {*after} <= {*before}


@pytest.mark.parametrize(("family", "encoder"), REDUCED, indirect=["family"])
def test_keeping_all_answers_as_without_a_reduction(family: Family, encoder: str) -> None:
    requests = requests_of_many_sizes(4, seed=1, max_new_tokens=8)
    expected = tokens(engine(family).generate(requests))
    assert_lively(expected)
    for settings in ({"schedule": "0:1.0"}, {"retention": 1.0}):
        pruning = Pruning(encoder=encoder, method="none", **settings)
        results = by_id(engine(family, pruning).generate(requests))
        assert {key: result.token_ids for key, result in results.items()} == expected
        for result in results.values():
            assert result.visual_tokens_encoder == result.visual_tokens
            assert result.retention in (None, 1.0)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_answers_change_with_what_is_kept(family: Family) -> None:
    """Guards the equalities above."""
    requests = requests_of_many_sizes(3, seed=5, max_new_tokens=4)
    answers = [tokens(engine(family).generate(requests))]
    for encoder in adapt(family.model).encoders:
        pruning = Pruning(schedule="0:0.2", encoder=encoder, method="none")
        answers.append(tokens(engine(family, pruning).generate(requests)))
    assert all(one != other for one, other in itertools.combinations(answers, 2))


@pytest.mark.parametrize(("family", "encoder"), LLAVAS, indirect=["family"])
def test_several_images_and_none_in_one_batch(family: Family, encoder: str) -> None:
    pictures = tuple(picture(number, size) for number, size in enumerate(MANY_SIZES[:4]))
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    requests = [
        Request(prompt="how many", images=pictures, id="album", sampling=sampling),
        Request(prompt="what is this", id="text", sampling=sampling),
        Request(prompt="what is this", images=pictures[:1], id="one", sampling=sampling),
    ]
    pruning = Pruning(schedule="0:12,3:5", encoder=encoder)
    results = by_id(engine(family, pruning).generate(requests))
    assert [results[name].visual_tokens_encoder for name in ("album", "one", "text")] == [48, 12, 0]
    assert results["album"].visual_tokens_stages == [20]
    assert results["one"].visual_tokens_stages == [5]
    # Three layers see 12 tokens of the image, and three see 5.
    adapter = adapt(family.model)
    text = (results["one"].prompt_tokens or 0) - (results["one"].visual_tokens or 0)
    flops = adapter.shape().prefill_flops([text + 12] * 3 + [text + 5] * 3)
    assert results["one"].prefill_flops == flops
