"""Requests that ask for an explanation, among others that do not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import trio
from tests.engine.support import by_id, picture
from tests.every_family.family import ARCHITECTURES, FAMILIES, requests_of_many_sizes
from tests.every_family.test_engine import engine
from trio.engine.request import Explanation, Request, Result, Sampling
from trio.families import registry
from trio.families.adapter import Adapter
from trio.families.llava import LlavaAdapter
from trio.job.images.pixel_cell import pack, unpack
from trio.pruning import kept
from trio.pruning.options import Pruning


def asking(requests: Iterable[Request]) -> list[Request]:
    return [dataclasses.replace(request, explain=True) for request in requests]


def explained(result: Result) -> Explanation:
    assert result.error is None and result.explanation is not None
    own, visual = result.explanation, result.visual_tokens
    assert sum(own.image_tokens) == visual and own.boxes.shape == (visual, 4)
    assert all(scores.shape == (visual,) for scores in own.saliency)
    assert {x.dtype for x in (own.boxes, *own.saliency)} == {np.dtype(np.float32)}
    return own


def assert_same_but_for_the_explanation(one: Result, other: Result) -> None:
    assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
    assert one.kept_tokens == other.kept_tokens
    assert one.candidate_logprobs == other.candidate_logprobs


def ends(counts: Sequence[int]) -> Iterable[slice]:
    return itertools.starmap(slice, itertools.pairwise(itertools.accumulate(counts, initial=0)))


def assert_scored_are_those_that_were_there(result: Result) -> None:
    """A token has a score at a stage if its image loses some there and it is one of those left."""
    own, kept_tokens = explained(result), result.kept_tokens or []
    stages = len(own.saliency)
    before: set[Any] = {*range(sum(own.image_tokens))}
    if len(kept_tokens) > stages:
        before = {*kept_tokens[0]}
    for scores, left in zip(own.saliency, kept_tokens[-stages:], strict=True):
        for span in ends(own.image_tokens):
            image = range(span.start, span.stop)
            there = {token for token in before if token is not None and token in image}
            # The class token, None, may be what an image loses.
            loses = [len({*left} & {*image}) < len(there)] + [True] * (None in before)
            known = {span.start + int(n) for n in np.flatnonzero(~np.isnan(scores[span]))}
            assert known in [there if one else set() for one in loses]
        before = {*left}


METHODS = {
    "trio": Pruning(retention=0.4),
    "gradient": Pruning(schedule="0:0.5,3:0.2", method="gradient"),
    "fastv": Pruning(schedule="2:0.4", method="fastv"),
}


QUICK = [("llava_next", "trio"), ("qwen3_vl", "gradient"), ("llava", "fastv")]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[pytest.mark.slow] * ((name, method) not in QUICK))
        for name in ARCHITECTURES
        for method in METHODS
    ],
)
def test_scores_of_those_who_ask_and_answers_as_without(name: str, method: str) -> None:
    family, pruning = FAMILIES[name](), METHODS[method]
    plain = requests_of_many_sizes(5, seed=4, max_new_tokens=4)
    half = [one if n % 2 else asking([one])[0] for n, one in enumerate(plain)]
    expected = by_id(engine(family, pruning).generate(plain))
    found = by_id(engine(family, pruning).generate(half))
    some = 0
    for request in half:
        result = found[request.id]
        assert_same_but_for_the_explanation(result, expected[request.id])
        if not request.explain:
            assert result.explanation is None
            continue
        own = explained(result)
        if not request.images:
            assert own.saliency == () and own.image_tokens == ()
            continue
        assert len(own.saliency) == len(result.visual_tokens_stages or ())
        assert_scored_are_those_that_were_there(result)
        some += 1
        if method == "trio":
            continue
        # Without suppression those of the highest scores stay.
        for scores, left in zip(own.saliency, result.kept_tokens or [], strict=True):
            for span in ends(own.image_tokens):
                here = np.isin(np.arange(span.start, span.stop), np.array(left))
                image = scores[span]
                if not np.isnan(image).all():
                    assert image[here].min() >= np.nanmax(np.where(here, np.nan, image))
    assert some >= 2


@pytest.mark.parametrize(
    "pruning",
    [Pruning(retention=0.4, method="random"), Pruning(retention=0.4, method="divprune"), None],
    ids=["random", "divprune", "unpruned"],
)
def test_methods_without_scores_have_boxes_alone(pruning: Pruning | None) -> None:
    own = FAMILIES["llava"]()
    (result,) = engine(own, pruning).generate(asking(requests_of_many_sizes(0, max_new_tokens=2)))
    explanation = explained(result)
    assert explanation.saliency == () and len(explanation.image_tokens) > 5
    assert not np.isnan(explanation.boxes).all()


def test_a_method_that_judges_before_the_decoder_has_scores() -> None:
    family = FAMILIES["qwen2_5_vl"]()
    pruning = Pruning(retention=0.3, method="eadp_llm")
    requests = asking(requests_of_many_sizes(2, seed=1, max_new_tokens=2))
    for result in engine(family, pruning).generate(requests):
        if result.num_images:
            assert len(explained(result).saliency) == 1
            assert_scored_are_those_that_were_there(result)


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("llava", "visionzip"),
        ("qwen2_5_vl", "scan"),
        pytest.param("llava_next", "scan", marks=pytest.mark.slow),
        pytest.param("llava_next", "prunesid", marks=pytest.mark.slow),
    ],
)
def test_scores_are_of_tokens_before_a_reduction(name: str, encoder: str) -> None:
    family, pruning = FAMILIES[name](), Pruning(retention=0.25, encoder=encoder)
    plain = requests_of_many_sizes(3, seed=2, max_new_tokens=2)
    expected = by_id(engine(family, pruning).generate(plain))
    for result in engine(family, pruning).generate(asking(plain)):
        assert_same_but_for_the_explanation(result, expected[result.id])
        if result.num_images:
            assert explained(result).saliency
            assert_scored_are_those_that_were_there(result)


def test_candidates_and_prompts_that_share_an_image() -> None:
    family, pruning = FAMILIES["llava_next"](), Pruning(schedule="3:0.4")
    image = picture(3, (90, 60))
    plain = [
        Request(prompt="how many", images=(image,), id=0, candidates=("yes", "no")),
        Request(prompt="what is red", images=(image,), id=1, sampling=Sampling(max_new_tokens=3)),
        Request(prompt="what is", images=(image,), id=2, sampling=Sampling(max_new_tokens=3)),
    ]
    worker = engine(family, pruning)
    found = by_id(worker.generate([*asking(plain[:2]), plain[2]]))
    assert worker.stats()["shared_prompts"] == 2
    alone = by_id(engine(family, pruning, share_images=False).generate(plain))
    for request in plain:
        assert found[request.id].kept_tokens == alone[request.id].kept_tokens
    first, second = explained(found[0]), explained(found[1])
    assert np.array_equal(first.boxes, second.boxes, equal_nan=True)
    assert not np.array_equal(first.saliency[0], second.saliency[0])
    for key in (0, 1):
        assert_scored_are_those_that_were_there(found[key])
    assert found[2].explanation is None


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_images_processed_elsewhere_are_explained_alike(name: str) -> None:
    family = FAMILIES[name]()
    worker = engine(family, Pruning(retention=0.4))
    images = [picture(1, (120, 60)), picture(2, (33, 97))]
    cell, headers = pack([worker.prepare.process(images)])
    sampling = Sampling(max_new_tokens=2)
    given: list[tuple[Any, ...]] = [(*images,), (*unpack(cell, *headers),)]
    here, there = (
        Request(prompt="what is", images=own, sampling=sampling, explain=True, id=n)
        for n, own in enumerate(given)
    )
    first, second = (explained(result) for result in worker.generate([here, there]))
    assert np.array_equal(first.boxes, second.boxes, equal_nan=True)
    assert not np.isnan(second.boxes).all()


class Silent(LlavaAdapter):
    """Says nothing of boxes, as an adapter from before them."""

    frame = staticmethod(Adapter.frame)
    boxes = Adapter.boxes


class Miscounting(LlavaAdapter):
    def boxes(self, inputs: Any) -> list[torch.Tensor]:
        return [own[1:] for own in super().boxes(inputs)]


def test_an_adapter_that_says_nothing_of_boxes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    trio.register("llava", Silent)
    family = FAMILIES["llava"]()
    requests = asking(requests_of_many_sizes(2, seed=3, max_new_tokens=2))
    results = [*engine(family, Pruning(retention=0.4)).generate(requests)]
    assert all(np.isnan(explained(result).boxes).all() for result in results)
    assert any(explained(result).saliency for result in results)
    trio.register("llava", Miscounting)
    results = [*engine(family, Pruning(retention=0.4)).generate(requests)]
    assert all(np.isnan(explained(result).boxes).all() for result in results)
    (line,) = caplog.messages
    assert "Miscounting.boxes: they are of shape [63, 4], and the image has 64" in line


def test_who_does_not_ask_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    class Counted(kept.Fetched):
        def __init__(self, *tensors: torch.Tensor) -> None:
            fetched.append(len(tensors))
            super().__init__(*tensors)

    monkeypatch.setattr(kept, "Fetched", Counted)
    family = FAMILIES["llava"]()
    asked: list[Any] = []
    monkeypatch.setattr(LlavaAdapter, "boxes", lambda *given: asked.append(given))
    monkeypatch.setattr(LlavaAdapter, "frame", staticmethod(lambda *given: asked.append(given)))
    requests = requests_of_many_sizes(2, seed=3, max_new_tokens=2)
    list(engine(family, Pruning(retention=0.4)).generate(requests))
    assert fetched and {*fetched} == {1} and not asked
    monkeypatch.undo()
    monkeypatch.setattr(kept, "Fetched", Counted)
    list(engine(family, Pruning(retention=0.4)).generate(asking(requests)))
    assert fetched[-1] == 3
