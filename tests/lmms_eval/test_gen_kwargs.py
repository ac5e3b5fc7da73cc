"""`generation_kwargs`: what is followed, what is refused, and where answers end."""

from __future__ import annotations

from typing import Any

import pytest

from trio.engine.request import Sampling
from trio.errors import UserError
from trio.lmms_eval.gen_kwargs import cut, read_generation

DEFAULT = Sampling(max_new_tokens=1024)


def sampling(**given: Any) -> Sampling:
    return read_generation(given, DEFAULT, seed=5).sampling


def test_the_usual_settings_of_a_task_are_greedy() -> None:
    usual = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert sampling(max_new_tokens=16, **usual) == Sampling(max_new_tokens=16)
    assert sampling() == DEFAULT


def test_what_is_drawn_has_its_own_seed() -> None:
    drawn = sampling(temperature=0.7, top_p=0.9)
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (0.7, 0.9, 5)


@pytest.mark.parametrize(
    ("do_sample", "temperature", "expected"),
    [(False, 0.7, 0.0), (None, 0.7, 0.7), (True, 0.7, 0.7), (True, None, 1.0), (None, None, 0.0)],
)
def test_do_sample_and_temperature_as_in_transformers(
    do_sample: bool | None, temperature: float | None, expected: float
) -> None:
    assert sampling(do_sample=do_sample, temperature=temperature).temperature == expected


def test_top_p_is_void_where_nothing_is_drawn() -> None:
    assert sampling(top_p=0, temperature=0).top_p is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams 4: there is no beam search"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not followed"),
        ({"max_new_token": 8}, r"max_new_token is not followed \(did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"do_sample": True, "temperature": 0}, "do_sample is true and temperature 0"),
        ({"temperature": 1, "top_p": 0}, "top_p: must be above 0"),
        ({"until": 3}, "until must be text or a list of texts"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling(**given)


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (["\n\n"], "a red 5\nand a green 7"),
        ("\n", "a red 5"),
        (["green", "red"], "a "),
        ([""], "a red 5\nand a green 7"),
        (None, "a red 5\nand a green 7"),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(until: object, expected: str) -> None:
    stops = read_generation({"until": until}, DEFAULT, seed=0).stops
    assert cut("a red 5\nand a green 7", stops) == expected
