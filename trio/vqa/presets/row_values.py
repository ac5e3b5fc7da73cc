"""Values of a row: found by a dotted path, and as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trio.errors import UserError

Row = Mapping[str, Any]
"""A column's value under its name, as `pyarrow.Scalar.as_py` gives it."""


def checked_path(path: str) -> str:
    """The path itself.

    Raises:
        UserError: it is no column's name, nor names joined by dots.
    """
    if not all(path.split(".")) or set(path) & set("[]{}"):
        raise UserError(f"{path!r} is no column, nor a field of one as in 'types.structural'")
    return path


def column_of(path: str, names: Collection[str] = ()) -> str:
    """The column in which a dotted path begins; itself where one of `names` is the whole of it."""
    return path if path in names else path.partition(".")[0]


def value_at(row: Row, path: str) -> Any:
    """What stands at a dotted path, or under that whole name; None below a missing value.

    Raises:
        UserError: there is no such column or field.
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise UserError(f"{path!r}: there is nothing named {name!r} within {value!r:.60}")
        if name not in value:
            raise UserError(f"{path!r}: no {name!r} among {', '.join(map(str, value))}")
        value = value[name]
    return value


def as_text(value: Any, name: str) -> str:
    """A text as it is, a number as Python prints it.

    Raises:
        UserError: `name` is neither.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{name!r} is no text or number but {kind(value)}")
    return str(value)


def as_texts(value: Any, name: str) -> list[str]:
    """The texts of a list without its missing ones; one that stands alone is a list of itself.

    Raises:
        UserError: an element of `name` is neither text nor number.
    """
    elements = value if isinstance(value, list | tuple) else [value]
    return [as_text(element, name) for element in elements if element is not None]


def kind(value: Any) -> str:
    """What a value is, for a message."""
    names = {bool: "true or false", dict: "a struct", list: "a list", bytes: "bytes"}
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")
