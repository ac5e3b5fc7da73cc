"""Pruning methods by name. No torch in here: a method is loaded when it is first asked for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from trio.errors import UserError, explaining
from trio.pruning import methods

if TYPE_CHECKING:
    from trio.pruning.method import Method
    from trio.pruning.options import Pruning

GROUP = "trio_vlm.methods"
"""Entry points by which installed packages add methods: `name = "module:MethodClass"`."""
USUAL = "trio"
"""The method that is meant where none is named."""
NEEDS = frozenset({"gradient", "attention", "coordinates", "text_tower", "instruction"})
"""What `Method.needs` may name."""
NONE = "none"
"""The name that stands for no method."""
_registered: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """Add a method to this process, under its `name`; also as a decorator of the class.

    A job's engines are processes of their own: there a method goes by `module:Class`, as in
    `--method my_module:MyMethod`, or by an entry point of the group `trio_vlm.methods`.

    Args:
        method: a subclass of `trio.Method`.

    Returns:
        The same class.

    Raises:
        UserError: it is none, or another method has that name.
    """
    name = getattr(method, "name", "")
    _check(method, repr(name or method))
    if name == NONE or (name in method_names() and _registered.get(name) is not method):
        raise UserError(f"method {name!r} is there already: give yours another name")
    _registered[name] = method
    return method


@contextmanager
def replaced(method: type[Method]) -> Iterator[None]:
    """As long as the context lasts, this class stands for the method of its name."""
    before = _registered.get(method.name)
    _registered[method.name] = method
    try:
        yield
    finally:
        if before is None:
            del _registered[method.name]
        else:
            _registered[method.name] = before


def method_names() -> tuple[str, ...]:
    """All methods: `trio`, `none`, those built in, those that packages add, those registered."""
    return tuple(dict.fromkeys([USUAL, NONE, *_built_in(), *_entries(), *_registered]))


def check_name(name: object) -> None:
    """Raise UserError unless a method may have this name; loads nothing."""
    if not isinstance(name, str) or (name not in method_names() and ":" not in name):
        raise UserError(
            f"method must be one of {', '.join(method_names())}, or module:Class, got {name!r}"
        )


def method_class(name: str) -> type[Method]:
    """The class of a method, not of `none`.

    Args:
        name: one of `method_names()`, or `module:Class`.

    Raises:
        UserError: there is none of this name, or it cannot be loaded.
    """
    check_name(name)
    if name in _registered:
        return _registered[name]
    if name in _built_in():
        return _check(*class_named(methods.__name__, name))
    return _load(_entries().get(name) or EntryPoint(name, name, GROUP))


def chooses_before_decoder(name: str) -> bool:
    """Whether a method chooses once, before the decoder's first layer; the usual one does not, and
    is not loaded for it."""
    return name not in (USUAL, NONE) and method_class(name).before_decoder


def needs_of(pruning: Pruning) -> frozenset[str]:
    """`Method.needs` of some settings; nothing where no method takes part."""
    return create(pruning).needs if pruning.chooses else frozenset()


def asks_for_text_tower(pruning: Pruning) -> bool:
    """Whether a method needs it; the usual one does not, and is not loaded for it."""
    return pruning.method not in (USUAL, NONE) and "text_tower" in create(pruning).needs


def create(pruning: Pruning) -> Method:
    """The method of some settings, with those of its own settings that `pruning` has.

    Raises:
        UserError: it is not there, or has no such settings.
    """
    method = method_class(pruning.method)
    fields = {field.name for field in dataclasses.fields(method)}
    common = {name: getattr(pruning, name) for name in fields if hasattr(pruning, name)}
    made = method(**common, **_own_options(method, fields - set(common), pruning))
    if unknown := made.needs - NEEDS:
        raise UserError(f"method {made.name} needs {', '.join(sorted(unknown))}, which nobody has")
    return made


def _own_options(method: type[Method], fields: set[str], pruning: Pruning) -> dict[str, Any]:
    if not pruning.method_options:
        return {}  # of most calls; hints cost more than all the rest
    hints = typing.get_type_hints(method)
    options = {}
    for name, _, value in (own.partition("=") for own in str(pruning.method_options).split(",")):
        if name not in fields:
            known = f"it has {', '.join(sorted(fields))}" if fields else "it has none"
            raise UserError(f"method {pruning.method} has no option {name!r}: {known}")
        options[name] = _converted(value, hints[name], f"{pruning.method}: option {name}")
    return options


def _converted(value: Any, kind: Any, what: str) -> Any:
    """A value in the type of its field, from that type or from text."""
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            known = ", ".join(map(str, typing.get_args(kind)))
            raise UserError(f"{what} must be one of {known}, got {value!r}")
        return value
    if kind is bool:
        words = {"true": True, "false": False}
        if str(value).lower() not in words:
            raise UserError(f"{what} must be true or false, got {value!r}")
        return words[str(value).lower()]
    try:
        return kind(value)
    except (TypeError, ValueError):
        name = getattr(kind, "__name__", kind)
        raise UserError(f"{what} must be a {name}, got {value!r}") from None


@functools.cache
def _built_in() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(methods.__path__))


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def class_named(package: str, name: str) -> tuple[Any, str]:
    """The class with this `name` in a package's module of this name, or None, and where it was
    looked for."""
    module = importlib.import_module(f"{package}.{name}")
    found = (value for value in vars(module).values() if getattr(value, "name", None) == name)
    return next(found, None), f"{module.__name__}:{name}"


def _load(entry: EntryPoint) -> type[Method]:
    with explaining(f"method {entry.value}", most=200):
        found = entry.load()
    return _check(found, entry.value)


def _check(found: Any, what: str) -> type[Method]:
    from trio.pruning.method import Method

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method {what} is no subclass of trio.Method")
    lacking = set(found.__abstractmethods__) | (set() if getattr(found, "name", "") else {"name"})
    if lacking:
        raise UserError(f"method {what} is not complete: it lacks {', '.join(sorted(lacking))}")
    if inspect.get_annotations(found) and "__dataclass_fields__" not in vars(found):
        raise UserError(f"method {what} is no dataclass: its fields are its settings")
    return found
