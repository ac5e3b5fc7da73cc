"""Settings as flags. tyro splits the command line and writes the help; `Value`s read the words.

To tyro a flag takes any words: what they mean is read here by what reads run.yaml, too, so that a
mistake is one line that names its flag. Each group of settings is a box of the help.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Union

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from trio.errors import UserError, suggestion
from trio.pruning.options import BuiltIn, BuiltInNumber
from trio.values import Setting

HINT = "(--help lists all flags)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Flags that stand together in the help."""

    title: str = ""
    """Empty for those that stand first, without a heading of their own."""
    about: str = ""
    """One line below the title."""
    settings: Sequence[Setting]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One of the things that a program does."""

    about: str
    groups: Sequence[Group]


def parse(
    argv: Sequence[str], *, prog: str, description: str, groups: Sequence[Group]
) -> dict[str, Any]:
    """Values by name, read, of the flags that are given; --help prints and exits.

    Raises:
        UserError: an unknown flag, a flag without its value, or a value that it cannot have.
    """
    return _parse(argv, _shown(groups), groups, prog=prog, description=description)


def parse_command(
    argv: Sequence[str], *, prog: str, description: str, commands: Mapping[str, Command]
) -> tuple[str, dict[str, Any]]:
    """The first word's command, and the rest as of `parse`."""
    first = argv[0] if argv else ""
    if first in commands:
        about, groups = commands[first].about, commands[first].groups
        prog = f"{prog} {first}"
        return first, parse(argv[1:], prog=prog, description=about, groups=groups)
    if first in ("-h", "--help"):
        made = [
            Annotated[_shown(()), tyro.conf.subcommand(name, description=line)]
            for name, one in commands.items()
            for line in one.about.splitlines()[:1]
        ]
        _parse(argv, Union[tuple(made)], (), prog=prog, description=description)  # noqa: UP007
    wrong = f"{first!r} is no command" if first else "no command is given"
    raise UserError(f"{wrong}; there are: {', '.join(commands)} {HINT}")


def _parse(
    argv: Sequence[str], shown: Any, groups: Sequence[Group], *, prog: str, description: str
) -> dict[str, Any]:
    words, unknown = tyro.cli(
        shown,
        prog=prog,
        description=description,
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=_registry(),
        return_unknown_args=True,
    )
    settings = {one.key: one for group in groups for one in group.settings}
    if unknown:
        flags = [one.flag for one in settings.values()]
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], flags)}")
    return {settings[name].name: _read(settings[name], given) for name, given in words.items()}


def _meant(word: str, flags: Sequence[str]) -> str:
    """How to mend a word that belongs to no flag."""
    if word.startswith("--"):
        return f"{suggestion(word.partition('=')[0], flags)} {HINT}"
    if word.startswith("-"):
        return " (a value that begins with - is given as --flag=VALUE)"
    return f" {HINT}"


def _read(setting: Setting, given: Any) -> Any:
    """The value of a flag's words."""
    value = setting.value
    if value.switch:
        return given
    occasions = given if value.several else [given]
    try:
        for words in occasions if value.single or not value.several else ():
            if len(words) != 1:
                raise UserError(f"expected one value, got {' '.join(words) or 'none'} {HINT}")
        given = [word for words in occasions for word in words]
        if not given:
            raise UserError("expected at least one value")
        return value.read(given if value.several else given[0])
    except UserError as error:
        raise UserError(f"{setting.flag}: {error}") from error


class _Shown:
    """To be a group of flags for tyro: see `_registry`."""

    fields: ClassVar[tuple[StructFieldSpec, ...]]


def _shown(groups: Sequence[Group]) -> type[_Shown]:
    """All groups, for tyro."""
    fields: list[StructFieldSpec] = []
    for group in groups:
        inner = tuple(_field(setting) for setting in group.settings)
        if not group.title:
            fields.extend(inner)
            continue
        box = type("Box", (_Shown,), {"fields": inner, "__doc__": ""})
        fields.append(
            StructFieldSpec(
                name=group.title,
                type=box,
                default=tyro.MISSING_NONPROP,
                helptext=group.about,
            )
        )
    return type("Flags", (_Shown,), {"fields": tuple(fields), "__doc__": ""})


def _field(setting: Setting) -> StructFieldSpec:
    value, unit = setting.value, setting.value.unit
    help_of: Callable[[], str] = lambda: _docs(setting.owner)[setting.name]  # noqa: E731
    words = PrimitiveConstructorSpec(
        nargs="*",
        metavar=unit if isinstance(unit, str) else unit(),
        instance_from_str=list,
        is_instance=lambda _: True,
        str_from_instance=lambda _: [],
    )
    kind: Any = Annotated[str, words]
    default: Any = ""
    if value.switch:
        kind, default = Annotated[bool | None, tyro.conf.DisallowNone], None
    elif value.several:
        kind, default = Annotated[tuple[kind, ...], tyro.conf.UseAppendAction], ()
    shown: Any = Annotated[kind, tyro.conf.arg(help_behavior_hint=_default(setting))]
    return StructFieldSpec(name=setting.key, type=shown, default=default, helptext=help_of)


def _default(setting: Setting) -> str:
    """What the help says of a default that the field's docstring does not tell."""
    default = setting.default
    open_or_off = default is None or isinstance(default, bool | BuiltIn | BuiltInNumber)
    if open_or_off or "(default" in _docs(setting.owner)[setting.name]:
        return ""
    if type(default) is tuple:
        default = (" " if setting.value.several else ",").join(map(str, default))
    return f"(default: {default})"


@lru_cache
def _docs(owner: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(made, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(made.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@lru_cache
def _registry() -> ConstructorRegistry:
    """What tells tyro of `_Shown`: its flags, and that it is made into those that are given."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def shown(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, _Shown)):
            return None
        return StructConstructorSpec(instantiate=_given, fields=info.type.fields)

    return registry


def _given(**found: Any) -> dict[str, Any]:
    """Words by name, those of inner groups with them; what is not given is "", () or None."""
    out: dict[str, Any] = {}
    for name, words in found.items():
        if isinstance(words, dict):
            out |= words
        elif words is not None and not isinstance(words, str) and words != ():
            out[name] = words
    return out
