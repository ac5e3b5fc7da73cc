"""Prompts made of a row's values, in the way of `str.format` with specs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, NamedTuple

from trio.errors import UserError
from trio.vqa.presets.row_values import Row, as_text, as_texts, checked_path, kind, value_at
from trio.vqa.rules import LETTERS


class _Place(NamedTuple):
    """A field of a template, and the text before it."""

    before: str
    path: str | None
    """None where only text is left."""
    spec: str
    argument: str


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    r"""A prompt with places for the values of a row, as in `{question}\n{choices:options}`."""

    text: str
    """Its source: `{name}` or `{name:spec}`, where a name may be a dotted path; `{{` is a brace."""
    fields: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """The names in it, in order, each once."""
    _places: tuple[_Place, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        places = tuple(_places(self.text))
        names = tuple(dict.fromkeys(place.path for place in places if place.path is not None))
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "fields", names)

    def fill(self, row: Row) -> str:
        """The prompt of a row.

        Raises:
            UserError: a name is not in the row, or its value does not suit its spec.
        """
        try:
            return "".join(place.before + _filled(place, row) for place in self._places)
        except UserError as error:
            raise UserError(f"prompt: {error}") from error


def _places(text: str) -> Iterator[_Place]:
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise UserError(
            f"{text!r:.80}: {error}; a brace that is meant as one is {{{{ or }}}}"
        ) from error
    for before, path, spec, conversion in parsed:
        if path is None:
            yield _Place(before, None, "", "")
            continue
        if conversion is not None or "{" in (spec or ""):
            raise UserError(f"{text!r:.80}: {path!r} takes no '!' and no braces")
        yield _Place(before, checked_path(path), *_spec(path, spec or ""))


def _spec(path: str, text: str) -> tuple[str, str]:
    """Name and argument of a spec; the name of one with an argument ends in an equals sign."""
    word, equals, argument = text.partition("=")
    if word + equals not in _SPECS:
        known = ", ".join(f"{name}TEXT" if name[-1] == "=" else name for name in _SPECS if name)
        raise UserError(f"unknown spec {text!r} of {path!r}; known: {known}")
    return word + equals, argument


def _filled(place: _Place, row: Row) -> str:
    if place.path is None:
        return ""
    return _SPECS[place.spec](value_at(row, place.path), place.path, place.argument)


def _plain(value: Any, name: str, argument: str) -> str:
    if value is None:
        raise UserError(f"{name!r} is missing; where it may be, give {{{name}:or=TEXT}} or :line")
    if isinstance(value, list):
        raise UserError(f"{name!r} is a list; give {{{name}:options}}, :inline or :join=TEXT")
    return as_text(value, name)


def _options(value: Any, name: str, argument: str) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in _lettered(value, name))


def _inline(value: Any, name: str, argument: str) -> str:
    return " ".join(f"({letter}) {text}" for letter, text in _lettered(value, name))


def _line(value: Any, name: str, argument: str) -> str:
    return "" if value in (None, "") else f"{as_text(value, name)}\n"


def _or(value: Any, name: str, argument: str) -> str:
    return argument if value in (None, "") else as_text(value, name)


def _without(value: Any, name: str, argument: str) -> str:
    return _plain(value, name, argument).removesuffix(argument)


def _join(value: Any, name: str, argument: str) -> str:
    return argument.join(_list(value, name))


def _lettered(value: Any, name: str) -> list[tuple[str, str]]:
    texts = _list(value, name)
    if len(texts) > len(LETTERS):
        raise UserError(f"{name!r} has {len(texts)} options; there are {len(LETTERS)} letters")
    return list(zip(LETTERS, texts, strict=False))


def _list(value: Any, name: str) -> list[str]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{name!r} is no list but {kind(value)}")
    return as_texts(value, name)


_SPECS: dict[str, Callable[[Any, str, str], str]] = {
    "": _plain,
    "options": _options,
    "inline": _inline,
    "line": _line,
    "or=": _or,
    "without=": _without,
    "join=": _join,
}
"""From a value, its name and the spec's argument to text."""
