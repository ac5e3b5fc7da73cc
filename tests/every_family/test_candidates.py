"""Candidates scored by the engine: as a plain forward pass, and as decoding led along them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import by_id, model_inputs, picture, tokens
from tests.every_family.family import Family, covering, requests_of_many_sizes, skip_without
from tests.every_family.test_engine import engine
from tests.tiny.llava import WORDS
from trio.engine.decoding.teacher_forcing import Answer, Answers
from trio.engine.request import Prepared, Request
from trio.families.registry import adapt
from trio.pruning.options import Pruning

PRUNINGS = {
    "trio": Pruning(retention=0.4),
    "keep": Pruning(schedule="1:30,4:20", position_ids="keep"),
    "scan": Pruning(retention=0.4, encoder="scan", position_ids="keep"),
}
QUICK = {
    "trio": ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"],
    "keep": ["llava", "qwen3_vl"],
    "scan": ["llava"],
}


def questions(count: int, *, seed: int = 0) -> list[Request]:
    """Prompts with no, one or many images and 1 to 5 candidates of 1 to 6 words."""
    chance = random.Random(seed)
    return [
        replace(
            request,
            candidates=tuple(
                " " + " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))
                for _ in range(chance.randint(1, 5))
            ),
            with_eos=chance.random() < 0.3,
        )
        for request in requests_of_many_sizes(count, seed=seed)
    ]


def plainly(family: Family, request: Request) -> list[list[float]]:
    """One forward pass of transformers for each candidate, over prompt and candidate."""
    prompt = model_inputs(family.processor, request)
    tokenizer = family.processor.tokenizer
    found = []
    for candidate in request.candidates:
        ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * request.with_eos
        whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)
        inputs: dict[str, Any] = prompt | {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
        }
        if "mm_token_type_ids" in prompt:
            text = torch.zeros(1, len(ids), dtype=torch.int64)
            inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], text], dim=1)
        with torch.no_grad():
            logits_TV = family.model(**inputs).logits[0]
        logprobs_NV = logits_TV[-len(ids) - 1 : -1].log_softmax(dim=-1)
        found.append(logprobs_NV[range(len(ids)), ids].tolist())
    return found


def scores(results: Any) -> dict[Any, list[list[float]]]:
    return {key: result.candidate_logprobs for key, result in by_id(results).items()}


def assert_alike(given: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    assert given.keys() == wanted.keys()
    for key, candidates in wanted.items():
        assert [len(one) for one in given[key]] == [len(one) for one in candidates]
        for one, other in zip(given[key], candidates, strict=True):
            assert one == pytest.approx(other, abs=tolerance), key


def test_unpruned_equals_a_plain_forward_pass(any_family: Family) -> None:
    requests = questions(7)
    expected = {request.id: plainly(any_family, request) for request in requests}
    assert len({round(one[-1], 3) for own in expected.values() for one in own}) > 10
    small = engine(any_family, max_running=3, batch_tokens=250)
    assert_alike(scores(small.generate(requests)), expected)
    assert_alike(scores(engine(any_family).generate(requests)), expected)


@pytest.mark.parametrize(
    ("family", "pruning"), covering(PRUNINGS, QUICK), indirect=["family"], scope="module"
)
def test_pruned_equals_decoding_led_along_them(family: Family, pruning: Pruning) -> None:
    skip_without(adapt(family.model), pruning.encoder)
    requests = questions(7, seed=1)
    own = engine(family, pruning)
    prepared = [own.prepare(request) for request in requests]
    led, given = [], {}
    for one in prepared:
        assert isinstance(one, Prepared)
        for number, candidate in enumerate(one.candidates):
            led.append(replace(one, id=(one.id, number), candidates=()))
            given[led[-1].id] = candidate
    answers = Answers(family.model, family.processor, max_new_tokens=max(map(len, given.values())))
    expected: dict[Any, list[list[float]]] = {request.id: [] for request in requests}
    for key, answer in sorted(answers(pruning, led, given)):
        assert isinstance(answer, Answer)
        logprobs_NV = answer.logits_NV.log_softmax(dim=-1)
        ids = list(answer.token_ids)
        expected[key[0]].append(logprobs_NV[range(len(ids)), ids].tolist())
    results = by_id(own.generate(requests))
    assert_alike({key: result.candidate_logprobs for key, result in results.items()}, expected)
    alone = {request.id: next(iter(own.generate([request]))) for request in requests}
    assert_alike(scores(alone.values()), scores(results.values()))
    for key, result in results.items():
        assert result.finish_reason == "scored"
        assert result.response is None
        assert not result.token_ids
        assert result.kept_tokens == alone[key].kept_tokens


def test_beside_requests_that_are_answered(family: Family) -> None:
    asked: Sequence[Request] = requests_of_many_sizes(6, seed=2)
    scored = [replace(one, id=f"scored {one.id}") for one in questions(6, seed=3)]
    both = engine(family, Pruning(retention=0.4), max_running=4)
    mixed = [one for pair in zip(asked, scored, strict=True) for one in pair]
    results = by_id(both.generate(mixed))
    apart = engine(family, Pruning(retention=0.4))
    assert {r.id: results[r.id].token_ids for r in asked} == tokens(apart.generate(asked))
    wanted = scores(apart.generate(scored))
    assert_alike({key: results[key].candidate_logprobs for key in wanted}, wanted, 5e-5)
    assert both.stats()["requests"] == len(mixed)


def test_one_prefill_for_all_candidates(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine(family, Pruning(retention=0.4))
    prefill = own._runner.prefill
    prompts: list[int] = []

    def counted(sequences: Any, features: Any, ahead: Any) -> Any:
        prompts.extend(sequence.prepared.id for sequence in sequences)
        return prefill(sequences, features, ahead)

    monkeypatch.setattr(own._runner, "prefill", counted)
    request = Request(prompt="how many", images=(picture(0),), candidates=(" a", " b", " c d"))
    results = by_id(own.generate(replace(request, id=number) for number in range(3)))
    assert [len(result.candidate_logprobs) for result in results.values()] == [3, 3, 3]
    assert sorted(prompts) == [0, 1, 2]
