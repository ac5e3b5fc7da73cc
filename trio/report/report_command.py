"""jobs/report.py: the page about a run, from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from trio.errors import UserError, first_line
from trio.job.cli import FAILED, OK, WRONG, fail
from trio.job.flags import HINT, Group, parse
from trio.job.storage import check_no_secret, locate, write_atomic
from trio.values import Value, accepted, settings_of

PROGRAM = "report.py"
PAGE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What can be said beside the directory."""

    output: Annotated[str | None, Value(read=accepted(check_no_secret), unit="FILE")] = None
    """Where the page goes, as a path or URI (default: report.html in the run's directory)."""


def main(argv: Sequence[str] | None, description: str) -> int:
    """Write the page that the arguments ask for; returns the exit code."""
    try:
        place, output = read(sys.argv[1:] if argv is None else argv, description)
        print(f"page: {write_page(place, output)}", flush=True)
        return OK
    except UserError as error:
        return fail(PROGRAM, str(error), WRONG)
    except OSError as error:
        return fail(PROGRAM, f"failed: {type(error).__name__}: {first_line(error, 300)}", FAILED)


def read(argv: Sequence[str], description: str) -> tuple[str, str | None]:
    """The run's directory, and where the page is to go.

    Raises:
        UserError: anything in the arguments that is wrong.
    """
    words = list(argv)
    place = words.pop(0) if words and not words[0].startswith("-") else None
    given = parse(
        words,
        prog=f"{PROGRAM} OUT",
        description=description,
        groups=[Group(settings=list(settings_of(Call()).values()))],
    )
    if place is None:
        raise UserError(f"give the directory of a run first, as in {PROGRAM} OUT {HINT}")
    return place, given.get("output")


def write_page(place: str, output: str | None = None) -> str:
    """Write the page about a run; returns where it is.

    Args:
        place: the run's directory or URI.
        output: of the page; None: `PAGE` in the run's directory.

    Raises:
        UserError: there is no such run, its files are damaged, or the page cannot be written.
        OSError: the storage does not answer.
    """
    from trio.report.page import page_of  # plotly takes half a second

    text = page_of(place)
    target = locate(place).join(PAGE) if output is None else locate(output)
    try:
        write_atomic(target, text.encode())
    except OSError as error:
        cure = "give --output FILE elsewhere" if output is None else "give another --output"
        raise UserError(f"{target.uri}: cannot be written ({first_line(error)}); {cure}") from error
    return target.uri
