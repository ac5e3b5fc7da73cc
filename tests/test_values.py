"""Readers of single values."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trio.errors import UserError
from trio.values import boolean, number, one_of, several, text, whole

ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())


@given(st.integers(-99, 99), st.integers(1, 99))
def test_a_number_may_be_a_fraction(above: int, below: int) -> None:
    assert number()(f"{above}/{below}") == number()(above / below) == above / below


@given(ANYTHING)
def test_readers_give_what_they_promise_or_a_user_error(value: Any) -> None:
    promises = {
        number(above=0, most=1): lambda got: isinstance(got, float) and 0 < got <= 1,
        number(least=-1): lambda got: math.isfinite(got) and got >= -1,
        whole(2): lambda got: type(got) is int and got >= 2,
        boolean: lambda got: got is value,
        text: lambda got: got == value and got.strip(),
        one_of(["a", "b"]).read: lambda got: got in ("a", "b"),
        several(text, least=1): lambda got: got and all(map(str.strip, got)),
    }
    for read, kept in promises.items():
        try:
            got = read(value)
        except UserError:
            continue
        assert kept(got)
