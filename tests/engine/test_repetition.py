"""Answers that go round in a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.support import mixed_requests
from tests.tiny.llava import tiny_llava, tiny_processor
from trio.engine.decoding.repetition import LONGEST, SHORTEST, RepetitionWatch
from trio.engine.engine import Engine
from trio.engine.request import Sampling
from trio.errors import UserError


def end_of(tokens: list[int], times: int) -> int | None:
    """Tokens after which the watch says that it loops."""
    watch = RepetitionWatch(times)
    return next((n for n, token in enumerate(tokens, start=1) if watch.loops(token)), None)


def by_the_book(tokens: list[int], times: int) -> int | None:
    """The same from the definition."""
    for stop in range(1, len(tokens) + 1):
        for length in range(1, min(LONGEST, stop) + 1):
            wanted = max(times * length, SHORTEST)
            tail = tokens[max(0, stop - wanted) : stop]
            if len(tail) == wanted and tail[length:] == tail[:-length]:
                return stop
    return None


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.integers(2, 5),
)
def test_a_loop_is_found_where_it_is_one(begin: list[int], gram: list[int], times: int) -> None:
    tokens = begin + gram * (times + SHORTEST)
    found = end_of(tokens, times)
    assert found is not None and found == by_the_book(tokens, times)


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(2, 4))
def test_any_answer(tokens: list[int], times: int) -> None:
    assert end_of(tokens, times) == by_the_book(tokens, times)


def test_what_good_answers_do_is_no_loop() -> None:
    assert end_of([7] * 15, 2) is None and end_of([7] * 16, 2) == 16
    listed = [n for item in range(40) for n in (5, 6, item)]
    assert end_of(listed, 4) is None


def test_a_restart_begins_anew() -> None:
    watch = RepetitionWatch(2)
    assert not any(watch.loops(3) for _ in range(15))
    watch.restart()
    assert not watch.loops(3)


@pytest.mark.parametrize("times", [0, 1, 2.0])
def test_what_is_no_number_of_times(times: int) -> None:
    with pytest.raises(UserError, match="stop_repetition"):
        Sampling(stop_repetition=times)


def test_the_engine_ends_an_answer_that_loops() -> None:
    """A model of random weights says the same again and again before long."""
    engine = Engine(tiny_llava(spread=0.02), tiny_processor(), max_running=4)
    long = Sampling(max_new_tokens=120, ignore_eos=True)
    requests = mixed_requests(6)
    free = {r.id: r for r in engine.generate([replace(r, sampling=long) for r in requests])}
    watched = replace(long, stop_repetition=3)
    asked = [replace(r, sampling=watched if n % 2 else long) for n, r in enumerate(requests)]
    found = {r.id: r for r in engine.generate(asked)}
    ended = 0
    for number, request in enumerate(requests):
        whole, answer = free[request.id], found[request.id]
        stop = by_the_book(whole.token_ids, 3) if number % 2 else None
        assert answer.token_ids == whole.token_ids[:stop]
        assert answer.finish_reason == ("length" if stop is None else "repetition")
        ended += stop is not None
    assert ended > 0
