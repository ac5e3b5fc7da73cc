"""Structured answers in the engine: they are as asked, and their neighbours as ever."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from tests.engine.support import by_id, lively_llava, mixed_requests, tokens
from tests.engine.test_engine import as_on_a_gpu
from tests.tiny.byte_level import spelling_llava
from tests.tiny.llava import WORDS, tiny_processor
from trio.engine.decoding import grammars, logits_rules
from trio.engine.decoding.grammars import misspelt
from trio.engine.engine import Engine
from trio.engine.request import Constraint, Request, Result, Sampling
from trio.errors import UserError

SPELLING = spelling_llava()
WORDY = lively_llava(layers=2)
EOS = 2
"""Of the model whose tokens are words."""
SCENE = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", 3]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "word": {"type": "string", "maxLength": 4},
    },
    "required": ["colour", "count", "word"],
}
LIST = {"type": "array", "items": SCENE, "minItems": 1, "maxItems": 3}
ASKED = (
    None,
    Constraint(choices=("yes", "no", "yes it is", "a red 5")),
    Constraint(regex=r"a (red|blue) [0-9]{1,3}"),
    Constraint(regex=r".{3,10}"),
    Constraint(regex=r"[^a-z]{2,} ?\w+"),
    Constraint(json_schema=json.dumps(SCENE)),
    Constraint(json_schema=json.dumps(LIST)),
    Constraint(json_schema=json.dumps({"type": "string", "pattern": "^a[^b]{1,9}b$"})),
)


def asked(count: int, most: int = 48) -> list[Request]:
    """Requests of all these kinds, greedy and drawn."""
    return [
        replace(
            request,
            sampling=Sampling(
                max_new_tokens=most,
                temperature=0.8 * (request.id // len(ASKED) % 2),
                seed=request.id,
                constraint=ASKED[request.id % len(ASKED)],
            ),
        )
        for request in mixed_requests(count, seed=2)
    ]


def spelling_engine(**options: Any) -> Engine:
    return Engine(*SPELLING, kv_bytes=1 << 26, **options)


def wordy_engine(model: Any = WORDY, **options: Any) -> Engine:
    return Engine(model, tiny_processor(), kv_bytes=1 << 24, **options)


def fits(constraint: Constraint, text: str) -> bool:
    """By other means than the engine's masks."""
    if constraint.json_schema is None:
        return text in constraint.choices or bool(re.fullmatch(constraint.regex or "$^", text))
    found = json.loads(text)
    validator = jsonschema.Draft202012Validator(json.loads(constraint.json_schema))
    compact = json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    return validator.is_valid(found) and (len(compact) == len(text) or "e" in text or "\\" in text)


@pytest.mark.parametrize("count", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_answer_that_ends_is_as_asked(count: int) -> None:
    requests = asked(count)
    engine = spelling_engine(max_running=24)
    results = by_id(engine.generate(requests))
    kinds: Counter[str] = Counter()
    for request in requests:
        result, constraint = results[request.id], request.sampling.constraint  # type: ignore[union-attr]
        if constraint is None:
            assert result.error is None
            continue
        kinds[(result.error or result.finish_reason).partition(":")[0]] += 1
        assert result.response is not None
        if result.error is None:
            assert fits(constraint, result.response), (constraint, result.response)
        elif result.error.startswith("incomplete: "):
            assert result.output_tokens == 48 and repr(result.response) in result.error
        else:  # halves of a character in JSON, which no mask knows of
            assert result.error.startswith("constraint: ") and "\ufffd" in result.response
    assert (
        kinds["stop"] > 0.5 * count and kinds["incomplete"] and kinds["constraint"] < 0.02 * count
    )
    assert engine.stats()["failed"] == kinds["incomplete"] + kinds["constraint"]
    plain = [request for request in requests if request.sampling.constraint is None]  # type: ignore[union-attr]
    assert tokens(spelling_engine(max_running=24).generate(plain)) == {
        request.id: results[request.id].token_ids for request in plain
    }


def test_neighbours_lags_and_restarts_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(10, most=16)
    together = by_id(spelling_engine().generate(requests))

    def same(others: dict[Any, Result]) -> None:
        for key, result in together.items():
            assert others[key].token_ids == result.token_ids
            assert (others[key].response, others[key].error) == (result.response, result.error)

    alone = spelling_engine()
    same({key: one for each in requests for key, one in by_id(alone.generate([each])).items()})
    same(by_id(as_on_a_gpu(spelling_engine(max_running=5)).generate(requests)))
    short = as_on_a_gpu(spelling_engine())
    decode, steps = short._runner.decode, itertools.count(1)

    def scarce() -> torch.Tensor:
        if next(steps) in (3, 9):
            raise torch.OutOfMemoryError("no memory left")
        return decode()

    monkeypatch.setattr(short._runner, "decode", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    same(by_id(short.generate(requests)))
    assert short.stats()["out_of_memory"] == 2


def choose(*choices: str, model: Any = WORDY, count: int = 24, **sampling: Any) -> list[Result]:
    given = {"max_new_tokens": 8, "constraint": Constraint(choices=choices), **sampling}
    requests = [
        Request(prompt=WORDS[n], id=n, sampling=Sampling(seed=n, **given)) for n in range(count)
    ]
    results = by_id(wordy_engine(model).generate(requests))
    return [results[n] for n in range(count)]


def test_choices_are_of_words_and_one_may_begin_another() -> None:
    choices = ("red", "red five", "a red five and a green seven", "no .")
    results = choose(*choices, temperature=3.0)
    assert {result.response for result in results} == set(choices)
    assert {result.finish_reason for result in results} == {"stop"}
    assert all(result.token_ids[-1] == EOS for result in results)


def test_an_answer_cut_is_in_error_unless_it_is_whole() -> None:
    results = choose("red", "red five", "how many are left", max_new_tokens=2, temperature=3.0)
    kinds = {(one.response, one.finish_reason) for one in results}
    assert kinds == {("red", "stop"), ("red five", "length"), ("how many", "error")}
    cut = next(one for one in results if one.error)
    assert cut.error == "incomplete: 2 tokens (max_new_tokens) are not enough: 'how many'"
    assert len(cut.token_ids) == 2 and cut.prompt_tokens


@pytest.mark.parametrize(
    ("constraint", "whole", "part"),
    [
        (Constraint(choices=("yes", "yes it is")), "yes", "yes it"),
        (Constraint(regex=r"(ab)+"), "abab", "aba"),
        (Constraint(json_schema='{"type": "array", "items": {"const": 1}}'), "[1,1]", "[1,1,"),
    ],
)
def test_a_loop_cuts_an_answer_as_too_few_tokens_do(
    constraint: Constraint, whole: str, part: str
) -> None:
    engine = spelling_engine()
    constrained = engine._admission._constraints(constraint, frozenset([1]))  # type: ignore[misc]

    def judged(text: str, finish_reason: Any) -> Result:
        (ids, *_) = engine.prepare.spellings(text)
        given = Result(id=0, response=text, token_ids=[*ids], finish_reason=finish_reason)
        return constrained.judge(given)

    for reason in ("length", "repetition"):
        kept = judged(whole, reason)
        assert (kept.response, kept.finish_reason, kept.error) == (whole, reason, None)
    cut = judged(part, "length").error
    assert cut and cut.startswith("incomplete: ") and "(max_new_tokens) are not enough" in cut
    assert judged(part, "repetition").error == (
        f"incomplete: it went round in a loop before it was whole (stop_repetition): {part!r}"
    )


def test_a_loop_ends_an_answer_that_has_a_constraint() -> None:
    engine = spelling_engine()
    given = {"max_new_tokens": 40, "stop_repetition": 3}
    asked = [Constraint(regex="(ab){20}"), Constraint(regex="a{5,}")]
    asked.append(Constraint(json_schema='{"const": "abababababababababababab"}'))
    asked.append(Constraint(choices=("ab" * 12,)))
    results = by_id(
        engine.generate(
            Request(prompt="a", id=n, sampling=Sampling(constraint=one, **given))  # type: ignore[arg-type]
            for n, one in enumerate(asked)
        )
    )
    errors = [results[n].error or "" for n in range(4)]
    assert all(errors[n].startswith("incomplete: it went round in") for n in (0, 2, 3)), errors
    assert results[1].response == "a" * len(results[1].response or "") and not errors[1]


def test_what_is_nested_too_deeply_costs_its_row_only() -> None:
    engine = spelling_engine()
    constrained = engine._admission._constraints(Constraint(json_schema="{}"), frozenset([1]))  # type: ignore[misc]
    result = Result(id=0, response="[" * 99_999, token_ids=[1], finish_reason="stop")
    assert (constrained.judge(result).error or "").startswith("constraint: JSON schema: maximum")


def test_a_stop_token_ends_whole_answers_only() -> None:
    blue = 5 + WORDS.index("blue")
    results = choose("red", "green red", stop_token_ids=(blue,), temperature=5.0)
    assert {one.response for one in results} == {"red", "green red"}
    assert {one.token_ids[-1] for one in results} == {EOS, blue}


@pytest.mark.parametrize(
    "rules",
    [
        {"suppress_tokens": [EOS]},
        {"forced_eos_token_id": EOS},
        {"bad_words_ids": [[5 + WORDS.index("five")]]},
        {"suppress_tokens": [EOS], "remove_invalid_values": True},
    ],
)
def test_where_rules_leave_no_token_the_row_is_in_error(rules: dict[str, Any]) -> None:
    model = lively_llava(layers=2)
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    constraint = Constraint(choices=("five five five", "five five five five"))
    sampling = Sampling(max_new_tokens=2, constraint=constraint)
    free = Sampling(max_new_tokens=3)
    if "suppress_tokens" in rules:
        sampling = replace(sampling, max_new_tokens=8)
    results = by_id(
        as_on_a_gpu(wordy_engine(model)).generate(
            [Request(prompt="red", id=0, sampling=sampling), Request(prompt="red", sampling=free)]
        )
    )
    assert (results[0].error or "").startswith(
        "constraint: choices five five five, five five five five: no token may come behind"
    )
    assert results[None].error is None and results[None].output_tokens == 3


def test_cuts_act_on_what_the_constraint_leaves() -> None:
    model = lively_llava(layers=2)
    model.generation_config.typical_p = 0.01
    drawn = choose("yes", "no", model=model, temperature=2.0, top_k=1)
    best = choose("yes", "no")
    assert [one.response for one in drawn] == [one.response for one in best]
    assert len({one.response for one in best}) == 2


def test_log_probabilities_are_the_models_own() -> None:
    for result in choose("yes", "no", count=4, first_logprobs=True):
        assert result.first_logprobs is not None
        own = result.first_logprobs[result.token_ids[0]].item()
        assert result.logprobs[0] == pytest.approx(own, abs=1e-5) and own < -0.01


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint(choices=("red", "purple")), "choice 'purple': the model has no tokens"),
        (Constraint(choices=("red", "<image>")), "choice '<image>': the model has no tokens"),
        (Constraint(regex="red"), "needs a tokenizer whose tokens spell the text"),
    ],
)
def test_what_a_model_cannot_be_held_to(constraint: Constraint, says: str) -> None:
    sampling = Sampling(constraint=constraint)
    with pytest.raises(UserError, match=says):
        wordy_engine(sampling=sampling)
    requests = [Request(prompt="red", id=0, sampling=sampling), Request(prompt="red", id=1)]
    results = by_id(wordy_engine().generate(requests))
    assert (results[0].error or "").startswith("constraint: ") and says in (results[0].error or "")
    assert results[1].error is None


def test_an_engine_may_have_a_constraint_for_all() -> None:
    sampling = Sampling(constraint=Constraint(choices=("yes", "no")))
    engine = wordy_engine(sampling=sampling)
    (result,) = engine.generate([Request(prompt="red ?")])
    assert result.response in ("yes", "no")
    (scored,) = engine.generate([Request(prompt="red ?", candidates=(" red", " blue"))])
    assert scored.finish_reason == "scored"


def test_stop_tokens_of_a_sampling_end_answers_of_a_model_without_any() -> None:
    model = lively_llava(layers=2)
    processor = tiny_processor()
    model.generation_config.eos_token_id = []
    sampling = Sampling(constraint=Constraint(choices=("yes", "no")), stop_token_ids=(EOS,))
    engine = Engine(model, processor, kv_bytes=1 << 24, sampling=sampling)
    (result,) = engine.generate([Request(prompt="red ?")])
    assert result.response in ("yes", "no") and result.token_ids[-1] == EOS


def test_what_cannot_be_followed_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []

    def watched(*given: Any) -> str | None:
        looks.append(given)
        return misspelt(*given)

    monkeypatch.setattr(grammars, "misspelt", watched)
    made = wordy_engine()._admission._constraints
    assert made is not None
    says = []
    for regex in ("red", "red", "blue"):
        with pytest.raises(UserError, match="spell the text") as raised:
            made(Constraint(regex=regex), frozenset([EOS]))
        says.append(str(raised.value))
    assert len(looks) == 1 and len(set(says)) == 1


@pytest.mark.parametrize(
    "at", ["TokenizerInfo.from_huggingface", "GrammarCompiler.compile_grammar"]
)
def test_what_the_library_raises_is_one_line(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise RuntimeError("[01:02:03] /a/b.cc:4: odd\nmore")

    monkeypatch.setattr(f"xgrammar.{at}", fails)
    made = spelling_engine()._admission._constraints
    assert made is not None
    with pytest.raises(UserError, match=r": odd$"):
        made(Constraint(regex="a"), frozenset([1]))


def test_a_stop_token_that_no_model_has_is_one_line() -> None:
    made = spelling_engine()._admission._constraints
    assert made is not None
    with pytest.raises(UserError, match=r"regex 'a': .*stop token"):
        made(Constraint(regex="a"), frozenset([10**7]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give one of them"),
        ({"regex": "a", "choices": ("a",)}, "give one of them"),
        ({"choices": "yes"}, "choices is a text"),
    ],
)
def test_a_constraint_is_one_of_three(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Constraint(**given)


def test_an_answer_without_end_has_no_constraint() -> None:
    with pytest.raises(UserError, match="ignore_eos"):
        Sampling(ignore_eos=True, constraint=Constraint(regex="a"))
    model = lively_llava(layers=2)
    processor = tiny_processor()
    model.generation_config.eos_token_id = []
    engine = Engine(model, processor, kv_bytes=1 << 24)
    sampling = Sampling(constraint=Constraint(choices=("yes", "no")))
    (result,) = engine.generate([Request(prompt="red", sampling=sampling)])
    assert "the model has no end of sequence" in (result.error or "")


def test_no_work_where_no_request_has_a_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    ruled = logits_rules.ruled

    def watched(*given: Any) -> Any:
        seen.append(ruled(*given))
        return seen[-1]

    monkeypatch.setattr("trio.engine.engine.ruled", watched)
    by_id(wordy_engine().generate(mixed_requests(4)))
    assert seen and all(one is None for one in seen)


@pytest.mark.parametrize("answer", ["yes", "is the image", "<image>", "caf\u00e9 \u56f3"])
def test_spellings_decode_to_the_answer(answer: str) -> None:
    prepare = spelling_engine().prepare
    found = prepare.spellings(answer)
    assert {prepare.text_of(ids) for ids in found} == {answer, f" {answer}"}
    assert all(prepare.image_token_id not in ids for ids in found)
