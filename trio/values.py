"""Types of settings: readers of flags and YAML values, with units. No torch.

A setting is a field of a dataclass whose annotation holds a `Value`, as in `limit: Rows | None`.
Flags, run.yaml and their help are made from such fields (`trio.job.flags`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import get_annotations
from typing import Annotated, Any, get_args, get_type_hints

from trio.errors import UserError

Reader = Callable[[Any], Any]
"""Takes text of the command line or a YAML value, returns it checked, raises UserError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """What a setting may be."""

    read: Reader
    """From text or YAML; of a setting with several values, from a list or one of them."""
    unit: str | Callable[[], str]
    """Stands behind the flag in the help: TOKENS, SECONDS, or the words to choose from."""
    several: bool = False
    """Whether its flag takes any number of values, which it keeps as a tuple."""
    single: bool = False
    """Of several values: whether each has a flag of its own, as a text with spaces must."""
    switch: bool = False
    """Whether its flag takes no value: --name and --no-name."""


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"expected text, got {value!r}")
    return value


def accepted(check: Callable[[str], Any]) -> Reader:
    """Text that `check` raises no UserError over; the text itself, not what it stands for."""

    def read(value: Any) -> str:
        check(text(value))
        return str(value)

    return read


def several(read: Reader, *, least: int = 0) -> Reader:
    """A tuple of values, each read by `read`; one that stands alone is a tuple of itself."""

    def read_all(value: Any) -> tuple[Any, ...]:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(items) < least:
            raise UserError("expected at least one value")
        return tuple(read(item) for item in items)

    return read_all


def many(read: Reader, unit: str, *, least: int = 0) -> Value:
    """Any number of values behind the flag."""
    return Value(read=several(read, least=least), unit=unit, several=True)


def each(read: Reader, unit: str) -> Value:
    """Any number of values, each behind a flag of its own."""
    return Value(read=several(read), unit=unit, several=True, single=True)


def listed(read: Reader) -> Reader:
    """A tuple of values, of text with commas or a list."""

    def read_all(value: Any) -> tuple[Any, ...]:
        if isinstance(value, list | tuple):
            return several(read, least=1)(value)
        return tuple(read(part.strip()) for part in text(value).split(","))

    return read_all


def names(value: Any) -> tuple[str, ...]:
    """Names, in text with commas or in a list, each once."""
    return tuple(dict.fromkeys(listed(text)(value)))


def number(*, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Reader:
    """A finite real number within bounds, also written as 1/9."""
    span = " and ".join(
        f"{words} {bound:g}"
        for words, bound in (("above", above), ("at least", least), ("at most", most))
        if math.isfinite(bound)
    )

    def read(value: Any) -> float:
        result = _real(value)
        if not (least <= result <= most and result > above):
            raise UserError(f"must be {span}, got {value}")
        return result

    return read


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"expected a number, got {value!r}")
    try:
        above, _, below = str(value).partition("/")
        result = float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"expected a number, got {value!r}") from None
    if not math.isfinite(result):
        raise UserError(f"expected a finite number, got {value!r}")
    return result


def whole(least: int) -> Reader:
    """A whole number from `least` on."""

    def read(value: Any) -> int:
        try:
            result = int(value) if isinstance(value, str | int) else None
        except ValueError:
            result = None
        if result is None or isinstance(value, bool):
            raise UserError(f"expected a whole number, got {value!r}")
        if result < least:
            raise UserError(f"must be at least {least}, got {result}")
        return result

    return read


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"expected true or false, got {value!r}")
    return value


def one_of(words: Iterable[str] | Callable[[], Iterable[str]]) -> Value:
    """One of some words, which a function may give when they are asked for."""

    def known() -> tuple[str, ...]:
        return tuple(words() if callable(words) else words)

    def read(value: Any) -> str:
        if value in known():
            return str(value)
        raise UserError(f"unknown value {value!r}; available: {', '.join(known())}")

    return Value(read=read, unit=lambda: "{" + ",".join(known()) + "}")


Model = Annotated[str, Value(read=text, unit="MODEL")]
Shape = Annotated[str, Value(read=text, unit="SHAPE")]
Text = Annotated[str, Value(read=text, unit="TEXT")]
Switch = Annotated[bool, Value(read=boolean, unit="", switch=True)]
Fraction = Annotated[float, Value(read=number(above=0, most=1), unit="FRACTION")]
Share = Annotated[float, Value(read=number(least=0, most=1), unit="FRACTION")]
Seed = Annotated[int, Value(read=whole(0), unit="SEED")]
Tokens = Annotated[int, Value(read=whole(1), unit="TOKENS")]
Rows = Annotated[int, Value(read=whole(1), unit="ROWS")]
Pixels = Annotated[int, Value(read=whole(1), unit="PIXELS")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A field with a `Value`."""

    name: str
    group: str
    """The field of the outer dataclass that it lies in; empty for one of the outer's own."""
    owner: type
    """The dataclass that has the field and its docstring."""
    value: Value
    default: Any

    @property
    def key(self) -> str:
        """The name without the underscore that sets it apart from a word of Python."""
        return self.name.rstrip("_")

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")


def settings_of(made: Any, group: str = "", *, inner: bool = True) -> dict[str, Setting]:
    """By name: the settings of a dataclass with its defaults, and (`inner`) of the dataclasses in
    it."""
    hints = get_type_hints(type(made), include_extras=True)
    found: dict[str, Setting] = {}
    for field in fields(made):
        name, default, value = field.name, getattr(made, field.name), _value(hints[field.name])
        if value is not None:
            owner = next(one for one in type(made).__mro__ if name in get_annotations(one))
            found[name] = Setting(name=name, group=group, owner=owner, value=value, default=default)
        elif inner and is_dataclass(default):
            further = settings_of(default, name)
            assert not found.keys() & further.keys(), "a flag's name stands once"
            found |= further
    return found


def replaced(made: Any, settings: Mapping[str, Setting], changes: Mapping[str, Any]) -> Any:
    """Other values of a dataclass's settings by name, whatever their group; None stands for the
    default."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        setting = settings[name]
        parts.setdefault(setting.group, {})[name] = setting.default if value is None else value
    own = parts.pop("", {})
    groups = {group: replace(getattr(made, group), **part) for group, part in parts.items()}
    return replace(made, **own, **groups)


def plain(value: Any) -> Any:
    """A setting's value as YAML and JSON would give it back."""
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _value(hint: Any) -> Value | None:
    """The `Value` in an annotation, also inside `X | None`."""
    if isinstance(hint, Value):
        return hint
    return next((found for part in get_args(hint) if (found := _value(part))), None)
