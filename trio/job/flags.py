"""Settings as flags. argparse splits the command line and writes the help; `Value`s read the words.

To argparse a flag takes any words: what they mean is read here by what reads run.yaml, too, so that
a mistake is one line that names its flag.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NoReturn

from trio.errors import UserError
from trio.job.run_yaml import suggestion
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


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            usage="%(prog)s [FLAG ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} {HINT}")


def parse(
    argv: Sequence[str], *, prog: str, description: str, groups: Sequence[Group]
) -> dict[str, Any]:
    """Values by name, read, of the flags that are given; --help prints and exits.

    Raises:
        UserError: an unknown flag, a flag without its value, or a value that it cannot have.
    """
    parser = _Parser(prog=prog, description=description)
    settings = {one.key: one for group in groups for one in group.settings}
    for group in groups:
        box = parser.add_argument_group(group.title, group.about) if group.title else parser
        for one in group.settings:
            _add(box, one)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [one.flag for one in settings.values()]
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], flags)}")
    return {settings[key].name: _read(settings[key], words) for key, words in vars(given).items()}


def parse_command(
    argv: Sequence[str], *, prog: str, description: str, commands: Mapping[str, Command]
) -> tuple[str, dict[str, Any]]:
    """The first word's command, and the rest as of `parse`."""
    first = argv[0] if argv else ""
    if first in commands:
        about, groups = commands[first].about, commands[first].groups
        return first, parse(argv[1:], prog=f"{prog} {first}", description=about, groups=groups)
    if first in ("-h", "--help"):
        parser = _Parser(prog=prog, description=description)
        listed = parser.add_subparsers(title="commands", metavar="COMMAND")
        for name, one in commands.items():
            listed.add_parser(name, help=one.about.partition("\n")[0].replace("%", "%%"))
        parser.parse_args(["--help"])
    wrong = f"{first!r} is no command" if first else "no command is given"
    raise UserError(f"{wrong}; there are: {', '.join(commands)} {HINT}")


def _add(box: Any, setting: Setting) -> None:
    value, unit = setting.value, setting.value.unit
    text = f"{_docs(setting.owner)[setting.name]} {_default(setting)}".strip()
    options: dict[str, Any] = {"dest": setting.key, "help": text.replace("%", "%%")}
    if value.switch:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = unit if isinstance(unit, str) else unit()
    if value.several:
        options |= {"action": "extend", "nargs": "+"}
    box.add_argument(setting.flag, default=argparse.SUPPRESS, **options)


def _meant(word: str, flags: Sequence[str]) -> str:
    """How to mend a word that belongs to no flag."""
    if word.startswith("--"):
        return f"{suggestion(word.partition('=')[0], flags)} {HINT}"
    if word.startswith("-"):
        return " (a value that begins with - is given as --flag=VALUE)"
    return f"; a value with spaces needs quotes {HINT}"


def _read(setting: Setting, words: Any) -> Any:
    """The value of a flag's words."""
    try:
        return words if setting.value.switch else setting.value.read(words)
    except UserError as error:
        raise UserError(f"{setting.flag}: {error}") from error


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
