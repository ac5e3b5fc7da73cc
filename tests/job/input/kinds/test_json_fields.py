"""Fields of JSON as columns of one type."""

from typing import Any

import pyarrow as pa
import pytest

from trio.job.input.kinds import json_fields
from trio.job.input.kinds.json_fields import Seen

CASES: list[tuple[list[Any], pa.DataType, list[Any]]] = [
    ([1, None, -3], pa.int64(), [1, None, -3]),
    ([1, 2.5], pa.float64(), [1.0, 2.5]),
    ([True, False], pa.bool_(), [True, False]),
    (["a", "007"], pa.string(), ["a", "007"]),
    ([None, None], pa.string(), [None, None]),
    ([[1, "é"], {"a": None}], pa.string(), ['[1, "é"]', '{"a": null}']),
    (["\ud800"], pa.string(), ["\\ud800"]),
]
MIXED: list[tuple[list[Any], list[Any]]] = [
    ([1, "x", True, 2.5], ["1", "x", "true", "2.5"]),
    ([1, 2**63], ["1", str(2**63)]),
    (["a", [1]], ["a", "[1]"]),
]


def column(values: list[Any]) -> tuple[pa.DataType, list[Any], list[str]]:
    objects = [{"a": value} for value in values]
    seen: Seen = {}
    for one in objects:
        json_fields.look(one, seen)
    (kind,) = (json_fields.types(seen) or {}).values()
    return kind, json_fields.column("a", kind, objects).to_pylist(), json_fields.disagreeing(seen)


@pytest.mark.parametrize(("values", "kind", "gives"), CASES)
def test_types(values: list[Any], kind: pa.DataType, gives: list[Any]) -> None:
    assert column(values) == (kind, gives, [])


@pytest.mark.parametrize(("values", "gives"), MIXED)
def test_text_where_types_disagree(values: list[Any], gives: list[Any]) -> None:
    assert column(values) == (pa.string(), gives, ["a"])


def test_over_several_shards() -> None:
    seen = json_fields.merged([{"a": {"integer"}, "b": set()}, {"c": {"text"}, "a": {"number"}}])
    assert json_fields.types(seen) == {"a": pa.float64(), "b": pa.string(), "c": pa.string()}


def test_fields_that_are_too_many_are_not_kept() -> None:
    parts: list[Seen] = [{}, {}]
    for number in range(1000):
        json_fields.look({f"key {number}": 1, "a": 0.5}, parts[number % 2])
    most = json_fields.MOST_FIELDS + 1
    assert [len(part) for part in parts] == [most, most] and parts[0]["a"] == {"number"}
    assert len(json_fields.merged(parts)) == most
    assert json_fields.types(json_fields.merged(parts)) is None
    halves: list[Seen] = [{f"{half} {n}": {"text"} for n in range(150)} for half in "ab"]
    assert json_fields.types(json_fields.merged(halves)) is None


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000, b"\xff"])
def test_what_is_no_object(text: str | bytes) -> None:
    assert json_fields.parsed(text) is None
