"""Candidates on their way into the engine: their tokens, what is refused, how they are batched."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import by_id, lively_llava, picture
from tests.engine.test_engine import as_on_a_gpu
from tests.engine.test_preprocess import byte_level_processor
from tests.tiny.llava import tiny_processor
from trio.engine.decoding.candidates import _parts
from trio.engine.engine import Engine
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.families.llava import LlavaAdapter

ASKED = Request(prompt="what is in the image?", images=(picture(0),))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(lively_llava(max_positions=192), tiny_processor(), kv_bytes=1 << 24)


def scored(engine: Engine, requests: list[Request]) -> dict[Any, list[list[float]]]:
    return {key: one.candidate_logprobs for key, one in by_id(engine.generate(requests)).items()}


def assert_close(given: dict[Any, list[list[float]]], wanted: dict[Any, list[list[float]]]) -> None:
    assert given.keys() == wanted.keys()
    for key, candidates in wanted.items():
        for one, other in zip(given[key], candidates, strict=True):
            assert one == pytest.approx(other, abs=1e-4), key


def prepared(**fields: Any) -> Prepared:
    prepare = Preprocessor(byte_level_processor(), LlavaAdapter)
    found = prepare(replace(ASKED, **fields))
    assert isinstance(found, Prepared), found
    return found


def test_tokens_are_those_of_the_whole_text() -> None:
    plain = prepared()
    own = prepared(candidates=(" image", " the <image>"), with_eos=True)
    assert own.input_ids == plain.input_ids
    tokenizer = byte_level_processor().tokenizer
    first, second = own.candidates
    assert tokenizer.decode(first) == " image</s>"
    assert 3 not in second, "an image's token that a candidate spells out is text"
    assert tokenizer.decode(second) == " the <image></s>"


def test_a_candidate_that_changes_the_prompt_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The prompt ends in "ASSISTANT:", which these words do not part from what follows.
    prepare = Preprocessor(tiny_processor(), LlavaAdapter)
    with caplog.at_level(logging.WARNING):
        found = [prepare(replace(ASKED, candidates=("yes", "no"))) for _ in range(2)]
    lines = [record for record in caplog.messages if "changes the prompt's last tokens" in record]
    assert len(lines) == 1
    tokenizer = tiny_processor().tokenizer
    spelt = prepare(replace(ASKED, candidates=("yes<image>", "yes</s>")))
    assert isinstance(spelt, Prepared)
    assert not {4, 2} & {token for ids in spelt.candidates for token in ids[1:]}
    for one in found:
        assert isinstance(one, Prepared)
        assert [tokenizer.decode(ids) for ids in one.candidates] == ["yes", "no"]


@pytest.mark.parametrize(
    ("candidates", "error"),
    [
        (("red", ""), "prompt: candidate '' has no tokens"),
        (("red", 3), "prompt: the candidate is int, not text"),
        ((" red" * 190,), "too_long: "),
        ("red", "prompt: candidates is a text"),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    engine: Engine, candidates: tuple[Any, ...], error: str
) -> None:
    (result,) = engine.generate([replace(ASKED, candidates=candidates)])
    assert result.error is not None
    assert result.error.startswith(error)
    assert not result.candidate_logprobs


def test_a_prepared_candidate_without_tokens_is_an_error(engine: Engine) -> None:
    one = engine.prepare(ASKED)
    assert isinstance(one, Prepared)
    (result,) = engine.generate([replace(one, candidates=((5,), ()))])
    assert result.error == "prompt: a candidate without tokens"


def test_a_long_answer_is_no_hindrance(engine: Engine) -> None:
    """What is not stored needs no room: the sampling's length is not that of candidates."""
    long = Sampling(max_new_tokens=500)
    (result,) = engine.generate([replace(ASKED, candidates=(" red", " red red"), sampling=long)])
    assert result.finish_reason == "scored"
    assert [len(own) for own in result.candidate_logprobs] == [1, 2]
    assert all(logprob < 0 for own in result.candidate_logprobs for logprob in own)
    assert result.output_tokens == 0
    assert result.kv_bytes is not None
    assert engine.stats()["kv_used_bytes_peak"] >= result.kv_bytes


def test_numbers_that_are_not_finite_fail_their_request_alone() -> None:
    model = lively_llava()
    engine = Engine(model, tiny_processor(), kv_bytes=1 << 24)
    bad = int(engine.prepare(replace(ASKED, candidates=(" blue red",))).candidates[0][0])  # type: ignore[union-attr]
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[bad] = math.nan
    fine = Request(prompt="red", candidates=(" red green", " green red"), id="fine")
    spoilt = Request(prompt="red", candidates=(" red green", " blue red"), id="spoilt")
    results = by_id(engine.generate([spoilt, fine]))
    assert results["fine"].finish_reason == "scored"
    assert results["spoilt"].error is not None
    assert results["spoilt"].error.startswith("numeric: ")
    (again,) = engine.generate([fine])
    for own, before in zip(
        again.candidate_logprobs, results["fine"].candidate_logprobs, strict=True
    ):
        assert own == pytest.approx(before, abs=1e-5)


def test_parts_hold_what_a_pass_takes() -> None:
    candidates = [[(1,), (1, 2, 3)], [], [(1, 2), (1, 2, 3, 4, 5, 6), (7, 8)]]

    def parts(most: int, stored: tuple[int, ...] = (0, 0, 0)) -> list[list[tuple[int, int]]]:
        found = _parts(candidates, stored, most)
        return [[(row, number) for row, number, _ in part] for part in found]

    assert parts(4) == [[(0, 1), (2, 0)], [(2, 1)], [(2, 2)]]
    assert parts(100) == [[(0, 1), (2, 0), (2, 1), (2, 2)]]
    # A long prompt makes the rectangle long for all: it is read alone.
    assert parts(100, (90, 0, 3)) == [[(0, 1)], [(2, 0), (2, 1), (2, 2)]]
    assert not list(_parts([[(1,)]], [5], 3))


def test_parts_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("red", "green", "blue")
    three = tuple(f" {a} {b} {c}" for a, b, c in itertools.product(words, repeat=3))
    requests = [
        Request(prompt="red " * (1 + 4 * n), images=ASKED.images[n:], id=n, candidates=three[n::2])
        for n in range(2)
    ]
    model = lively_llava()
    whole = scored(Engine(model, tiny_processor(), kv_bytes=1 << 24), requests)
    monkeypatch.setattr("trio.engine.decoding.candidates.WIDEST", 7)
    monkeypatch.setattr("trio.engine.decoding.candidates.HEAD_ROWS", 3)
    apart = scored(as_on_a_gpu(Engine(model, tiny_processor(), kv_bytes=1 << 24)), requests)
    assert_close(apart, whole)
    assert len(whole[0]) == 14


def test_out_of_memory_scores_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In smaller batches, which is told; nothing is scored twice or lost."""
    requests = [
        Request(prompt="red " * n, id=n, candidates=(" red green", " blue red")) for n in (1, 2, 3)
    ]
    model = lively_llava()
    whole = scored(Engine(model, tiny_processor(), kv_bytes=1 << 24), requests)
    engine = Engine(model, tiny_processor(), kv_bytes=1 << 24)
    branch, tries = engine._runner.branch, []

    def short(sequences: Any, branches: Any) -> Any:
        tries.append(len(sequences))
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return branch(sequences, branches)

    monkeypatch.setattr(engine._runner, "branch", short)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert_close(scored(engine, requests), whole)
    assert tries[0] == 3
    assert engine.stats()["out_of_memory"] >= 1
    assert engine.stats()["candidate_tokens"] == 12
    assert not engine._cache.order


def test_results_without_candidates_have_none(engine: Engine) -> None:
    (result,) = engine.generate([ASKED])
    assert isinstance(result, Result)
    assert result.candidate_logprobs == []
    assert result.finish_reason in ("stop", "length")
