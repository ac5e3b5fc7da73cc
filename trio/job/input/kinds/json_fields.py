"""Fields of JSON objects as columns, of one type each over all objects of an input.

What is nested is its JSON text. Where types disagree a column is text, in which a number or a truth
value is what JSON writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

PREFIX = "json."
MOST_FIELDS = 200
"""More come from keys that are data themselves: the column `json` holds the text then."""
MOST_INT = 1 << 63
_TYPES = {
    frozenset[str](): pa.string(),
    frozenset({"truth"}): pa.bool_(),
    frozenset({"integer"}): pa.int64(),
    frozenset({"number"}): pa.float64(),
    frozenset({"integer", "number"}): pa.float64(),
    frozenset({"text"}): pa.string(),
    frozenset({"nested"}): pa.string(),
}
Seen = dict[str, set[str]]
"""By field, in their order: the types of its values; of too many fields the first."""


def parsed(data: bytes | str) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return {clean(name): content for name, content in value.items()}


def look(fields: Mapping[str, Any], seen: Seen) -> None:
    """Add an object's fields to what is known of their types."""
    for name, value in fields.items():
        if (kinds := _kinds(seen, name)) is not None and value is not None:
            kinds.add(_type_of(value))


def _kinds(seen: Seen, name: str) -> set[str] | None:
    """Of a field; None where there are too many already, which one more than the most tells."""
    return seen.setdefault(name, set()) if len(seen) <= MOST_FIELDS else seen.get(name)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "integer" if -MOST_INT <= value < MOST_INT else "text"
    if isinstance(value, float):
        return "number"
    return "text" if isinstance(value, str) else "nested"


def merged(parts: Iterable[Seen]) -> Seen:
    out: Seen = {}
    for part in parts:
        for name, kinds in part.items():
            if (known := _kinds(out, name)) is not None:
                known.update(kinds)
    return out


def types(seen: Seen) -> dict[str, pa.DataType] | None:
    """Of the columns, by field; None where these are too many."""
    if len(seen) > MOST_FIELDS:
        return None
    return {name: _TYPES.get(frozenset(kinds), pa.string()) for name, kinds in seen.items()}


def disagreeing(seen: Seen) -> list[str]:
    """Fields that are text because their values are of several types."""
    return [name for name, kinds in seen.items() if frozenset(kinds) not in _TYPES]


def column(name: str, kind: pa.DataType, objects: Sequence[Mapping[str, Any] | None]) -> pa.Array:
    """A field of all objects, null where there is none."""
    values = [None if one is None else one.get(name) for one in objects]
    if pa.types.is_string(kind):
        values = [None if value is None else _as_text(value) for value in values]
    elif pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, kind)


def _as_text(value: Any) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def clean(text: str) -> str:
    """Text that Arrow takes: half of a pair of surrogates is none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
