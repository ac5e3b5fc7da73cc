"""The commands of jobs/benchmark.py: what each can be told, and how one is chosen. No torch."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from trio.errors import UserError
from trio.job.cli import WRONG, fail
from trio.job.flags import Command, Group, parse_command
from trio.pruning.options import Pruning
from trio.values import Value, replaced, settings_of, text, whole

PROGRAM = "benchmark.py"


def _new_file(value: Any) -> Path:
    """A measurement takes long, and is written at its end."""
    path = Path(text(value))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no file can be written there; name one in a directory")
    return path


Count = Annotated[int, Value(read=whole(1), unit="N")]
File = Annotated[Path, Value(read=lambda value: Path(text(value)), unit="FILE")]
NewFile = Annotated[Path, Value(read=_new_file, unit="FILE")]
DTYPES = ("float32", "bfloat16", "float16")


PRUNING = ("retention", "schedule", "method", "encoder")
"""Of a command's `pruning`: the settings that have flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a command is told, and what it does."""

    @classmethod
    def groups(cls) -> list[Group]:
        """The command's flags."""
        found = settings_of(cls()).values()
        shown = [one for one in found if not one.group or one.name in PRUNING]
        return [Group(settings=shown)]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Of the flags that are given.

        Raises:
            UserError: they exclude each other.
        """
        made: Self = replaced(cls(), settings_of(cls()), given)
        return made

    def run(self) -> int:
        """Measure, print and write; returns the exit code."""
        raise NotImplementedError


def main(argv: Sequence[str] | None, description: str) -> int:
    """Run a command from its arguments; returns the exit code."""
    try:
        return read(sys.argv[1:] if argv is None else argv, description).run()
    except UserError as error:
        return fail(PROGRAM, str(error), WRONG)


def read(argv: Sequence[str], description: str) -> Measurement:
    """What a command line asks for.

    Raises:
        UserError: anything in it that is wrong.
    """
    # They import this module for what they share.
    from trio.benchmark.engine_commands import Launches, Questions
    from trio.benchmark.peers_command import Peers
    from trio.benchmark.quality_commands import Calibrate, Quality
    from trio.benchmark.speed_commands import Cost, Likelihood, Pipeline, Speed, Targets

    kinds = (
        Quality, Speed, Likelihood, Questions, Cost, Launches, Targets, Peers, Pipeline,
        Calibrate,
    )  # fmt: skip
    commands: dict[str, type[Measurement]] = {kind.__name__.lower(): kind for kind in kinds}
    shown = {
        name: Command(about=inspect.getdoc(kind) or "", groups=kind.groups())
        for name, kind in commands.items()
    }
    name, given = parse_command(argv, prog=PROGRAM, description=description, commands=shown)
    return commands[name].of(given)


def one_ninth(pruning: Pruning) -> Pruning:
    """The same, keeping one ninth where nothing says how much to keep."""
    given = pruning.retention is not None or pruning.schedule is not None
    return pruning if given else replace(pruning, retention=1 / 9)


def line(conditions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(path: Path | None, result: object) -> None:
    """As JSON, in one go: what a run has so far may be read, and must outlive its interruption."""
    if path is not None:
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
