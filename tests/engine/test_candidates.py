"""Candidates on their way into the engine: their tokens, what is refused, how they are batched."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import by_id, lively_llava, picture
from tests.engine.test_preprocess import byte_level_processor
from tests.tiny.llava import tiny_processor
from trio.engine.decoding.candidates import _parts
from trio.engine.engine import Engine
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request, Result
from trio.families.llava import LlavaAdapter

ASKED = Request(prompt="what is in the image?", images=(picture(0),))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(lively_llava(max_positions=192), tiny_processor(), kv_bytes=1 << 24)


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
    for one in found:
        assert isinstance(one, Prepared)
        assert [tokenizer.decode(ids) for ids in one.candidates] == ["yes", "no"]


@pytest.mark.parametrize(
    ("candidates", "error"),
    [
        (("red", ""), "prompt: candidate '' has no tokens"),
        (("red", 3), "prompt: the candidate is int, not text"),
        ((" red" * 190,), "too_long: "),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    engine: Engine, candidates: tuple[Any, ...], error: str
) -> None:
    (result,) = engine.generate([replace(ASKED, candidates=candidates)])
    assert result.error is not None
    assert result.error.startswith(error)
    assert not result.candidate_logprobs


def test_a_long_answer_is_no_hindrance(engine: Engine) -> None:
    """What is not stored needs no room: the sampling's length is not that of candidates."""
    (result,) = engine.generate([replace(ASKED, candidates=(" red", " red red"))])
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


def test_parts_hold_as_many_tokens_as_a_pass_computes() -> None:
    candidates = [[(1,), (1, 2, 3)], [], [(1, 2), (1, 2, 3, 4, 5, 6), (7, 8)]]
    found = [[(row, number) for row, number, _ in part] for part in _parts(candidates, 3)]
    assert found == [[(0, 1), (2, 0)], [(2, 1)], [(2, 2)]]
    assert [len(part) for part in _parts(candidates, 100)] == [4]
    assert not list(_parts([[(1,)]], 3))


def test_results_without_candidates_have_none(engine: Engine) -> None:
    (result,) = engine.generate([ASKED])
    assert isinstance(result, Result)
    assert result.candidate_logprobs == []
    assert result.finish_reason in ("stop", "length")
