"""How a field of a preset is made of a row's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from trio.errors import UserError
from trio.vqa.presets.row_values import (
    Row,
    as_text,
    as_texts,
    checked_path,
    column_of,
    kind,
    value_at,
)

_SCALARS = str | int | float
_EACH = "[]"


class ColumnExpression(Protocol):
    """Makes a value of a row."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns it reads."""

    def of(self, row: Row) -> Any:
        """Text, number, bool or a list of them; None where it is missing."""


def column_expression(written: Any) -> ColumnExpression:
    """What stands in YAML for an expression.

    Args:
        written: a path, a list of paths, or one of `_NAMED` with a path.

    Raises:
        UserError: it is none of them.
    """
    if isinstance(written, str):
        return _path_or_each(written)
    if isinstance(written, list) and written and all(isinstance(path, str) for path in written):
        return Listed(paths=tuple(map(checked_path, written)))
    if isinstance(written, dict) and len(written) == 1:
        ((name, path),) = written.items()
        if name in _NAMED and isinstance(path, str):
            return _NAMED[name](path=checked_path(path))
    named = "".join(f", {{{name}: column}}" for name in _NAMED)
    raise UserError(f"expected column, column[], column[].field, [A, B]{named}; got {written!r}")


def _path_or_each(text: str) -> ColumnExpression:
    path, each, field = text.partition(_EACH)
    if not each:
        return AtPath(path=checked_path(path))
    if field and not field.startswith("."):
        raise UserError(f"{text!r}: behind [] comes nothing, or a field as in 'answers[].answer'")
    return Each(path=checked_path(path), field=checked_path(field[1:]) if field else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfPath:
    path: str

    @property
    def columns(self) -> frozenset[str]:
        return frozenset((column_of(self.path),))


@dataclass(frozen=True, kw_only=True, slots=True)
class AtPath(_OfPath):
    """A column, or a field of a struct, as it stands."""

    def of(self, row: Row) -> Any:
        value = value_at(row, self.path)
        elements = value if isinstance(value, list) else [value]
        for element in elements:
            if element is not None and not isinstance(element, _SCALARS):
                raise UserError(f"{self.path!r} holds {kind(element)}; name one of its fields")
        return [each for each in value if each is not None] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Each(_OfPath):
    """The texts of a list, or a field of each of its structs; missing if there are none."""

    field: str | None
    """An element that is a text stands for itself even where a field is named."""

    def of(self, row: Row) -> list[str] | None:
        value = value_at(row, self.path)
        elements = value if isinstance(value, list) else [value]
        return as_texts([self._text(element) for element in elements], self.path) or None

    def _text(self, element: Any) -> Any:
        if self.field is None or isinstance(element, str):
            return element
        return value_at(element, self.field)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """The texts of several columns in order, without missing ones; missing if all are."""

    paths: tuple[str, ...]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(map(column_of, self.paths))

    def of(self, row: Row) -> list[str] | None:
        values = [(path, value_at(row, path)) for path in self.paths]
        return [as_text(value, path) for path, value in values if value is not None] or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Present(_OfPath):
    """Whether a column holds something."""

    def of(self, row: Row) -> bool:
        return value_at(row, self.path) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels(_OfPath):
    """The corners x1, y1, x2, y2 of a box that is stored as x, y, width, height."""

    def of(self, row: Row) -> list[float] | None:
        box = value_at(row, self.path)
        if box is None:
            return None
        try:
            left, top, width, height = map(float, box)
        except (TypeError, ValueError):
            raise UserError(f"{self.path!r} is not x, y, width, height: {box!r:.60}") from None
        return [left, top, left + width, top + height]


_NAMED: dict[str, type[Present] | type[Pixels]] = {"present": Present, "pixels": Pixels}
