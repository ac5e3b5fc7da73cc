"""Readers of single settings: each takes text or a YAML value and returns it checked."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from trio.errors import UserError
from trio.pipeline.policy import parse_origin, redact
from trio.pipeline.storage import is_local, local_path
from trio.pruning.schedule import SHAPES, Schedule, ScheduleShape

Reader = Callable[[Any], Any]
SCHEDULE_FILES = (".yaml", ".yml")


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"expected text, got {value!r}")
    return value


def schedule(value: Any) -> str:
    """Stages as text; those in a file are read here, so that settings hold them, not its name."""
    read = text(value)
    return str(Schedule.load(read)) if read.endswith(SCHEDULE_FILES) else read


def shape(value: Any) -> str:
    """How a retention is spread over the layers, as text."""
    read = text(value)
    return read if read in SHAPES else str(ScheduleShape.parse(read))


def texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UserError("expected at least one value")
    return tuple(text(item) for item in items)


def _any_number(value: Any) -> tuple[str, ...]:
    return texts(value) if value not in ([], ()) else ()


def origins(value: Any) -> tuple[str, ...]:
    """Schemes and hosts, any number of them."""
    read = _any_number(value)
    for item in read:
        parse_origin(item)
    return read


def directories(value: Any) -> tuple[str, ...]:
    """Local directories, any number of them, made absolute: workers have other working ones."""
    read = _any_number(value)
    for item in read:
        if not is_local(item):
            raise UserError(f"expected a local directory, got {redact(item)!r}")
    try:
        return tuple(os.path.normpath(local_path(item)) for item in read)
    except OSError as error:
        raise UserError(str(error)) from error


def adapters(value: Any) -> tuple[str, ...]:
    """`model_type=module:Class`, any number of them."""
    read = _any_number(value)
    for item in read:
        if not re.fullmatch(r"[\w.-]+=\w+(\.\w+)*:\w+", item):
            raise UserError(
                f"expected TYPE=MODULE:CLASS, as in my_vl=my_module:MyAdapter: {item!r}"
            )
    return read


def address(value: Any) -> str:
    """Of a Ray: auto, local or host:port."""
    read = text(value)
    if read not in ("auto", "local") and not re.fullmatch(
        r"(\[[\da-fA-F:.]+\]|[\w.-]+):\d{1,5}", read
    ):
        raise UserError(f"expected auto, local or host:port, got {read!r}")
    return read


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"expected true or false, got {value!r}")
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"expected a number, got {value!r}")
    try:
        above, _, below = str(value).partition("/")
        number = float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise UserError(f"expected a finite number, got {value!r}")
    return number


def number(low: float, high: float = math.inf) -> Reader:
    """A real number in [low, high]."""

    def read(value: Any) -> float:
        result = _real(value)
        if not low <= result <= high:
            span = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"must be {span}, got {value}")
        return result

    return read


def above(low: float) -> Reader:
    """A real number above ``low``."""

    def read(value: Any) -> float:
        result = _real(value)
        if not result > low:
            raise UserError(f"must be above {low:g}, got {value}")
        return result

    return read


def threshold(value: Any) -> float:
    """A cosine above -1."""
    result = _real(value)
    if not -1.0 < result <= 1.0:
        raise UserError(f"must be above -1 and at most 1, got {value}")
    return result


def fraction(value: Any) -> float:
    """A real number in (0, 1], also written as 1/9."""
    result = _real(value)
    if not 0.0 < result <= 1.0:
        raise UserError(f"must be above 0 and at most 1, got {value}")
    return result


def at_least(low: int) -> Reader:
    """A whole number from ``low`` on."""

    def read(value: Any) -> int:
        try:
            result = int(value) if isinstance(value, str | int) else None
        except ValueError:
            result = None
        if result is None or isinstance(value, bool):
            raise UserError(f"expected a whole number, got {value!r}")
        if result < low:
            raise UserError(f"must be at least {low}, got {result}")
        return result

    return read


def choice(name: str, allowed: tuple[str, ...]) -> Reader:
    """One of ``allowed``."""

    def read(value: Any) -> str:
        if value in allowed:
            return str(value)
        raise UserError(f"unknown {name} {value!r}; available: {', '.join(allowed)}")

    return read


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a word that is nearly a known one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
