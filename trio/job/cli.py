"""The command line that inference jobs share: flags over --config, one line for a mistake."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from trio.errors import UserError
from trio.job import run_yaml
from trio.job.comparing.compared import GIVEN
from trio.job.flags import Group, parse
from trio.job.settings import FIELDS, Settings, made_of
from trio.pruning.method_registry import asks_for_text_tower
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import CHOICES, SHAPE
from trio.values import Setting, Switch, Value, settings_of, text

OK, FAILED, WRONG, ERRORS = 0, 1, 2, 3
RESEARCH = (*CHOICES, SHAPE)
"""Settings that stand last in the help: a checkpoint says them, else they are built in."""
BY_MODEL = (*RESEARCH, "revision")
"""Settings that a run resolves by its model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Flags that are no settings."""

    config: Annotated[str | None, Value(read=text, unit="FILE")] = None
    """Settings from a run.yaml; flags given beside it win."""
    dry_run: Switch = False
    """Print what would be done, then stop."""


_CALL = settings_of(Call())
TITLES = [*dict.fromkeys(one.group for one in FIELDS.values() if one.group), "research"]


def groups(names: Iterable[str] = tuple(FIELDS), also: Iterable[Setting] = ()) -> list[Group]:
    """The flags of some settings with --config and --dry-run, and of what a program adds."""
    of_title: dict[str, list[Setting]] = {"": [*also, *_CALL.values()], **{t: [] for t in TITLES}}
    for name in names:
        of_title["research" if name in RESEARCH else FIELDS[name].group].append(FIELDS[name])
    return [
        Group(title=title, about=_about(title), settings=settings)
        for title, settings in of_title.items()
        if settings
    ]


def _about(title: str) -> str:
    if title == "research":
        return (
            "How tokens are chosen in detail; what is not given is the checkpoint's, else built in."
        )
    group = getattr(Settings(), title) if title else None
    return (group.__doc__ or "").partition("\n")[0] if group else ""


def read_call(
    argv: Sequence[str], *, prog: str, description: str, hidden: Collection[str] = ()
) -> tuple[Settings, bool]:
    """Settings of a job's arguments, and whether it is a dry run.

    hidden: names of settings, or of groups of them, that are none of this job's.

    Raises:
        UserError: anything in them that is wrong.
    """
    names = [n for n, one in FIELDS.items() if not {n, one.group} & set(hidden)]
    given = parse(argv, prog=prog, description=description, groups=groups(names))
    dry_run = given.pop("dry_run", False)
    return settings_from(given, given.pop("config", None)), dry_run


def settings_from(given: dict[str, Any], config: str | None) -> Settings:
    """Settings of flags, which are read, over those of a file.

    Raises:
        UserError: anything in the file that is wrong, and settings that exclude each other.
    """
    if config is None:
        return made_of(**given)
    source = f"--config {config}"
    try:
        written = run_yaml.parse(Path(config).read_bytes(), source)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error}") from error
    try:
        made_of(**written)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    _forget_resolved(source, written, given)
    for name, other in (("retention", "schedule"), ("schedule", "retention")):
        if name in given:
            written.pop(other, None)
    if "only_row" in given:  # one row replaces no uploaded data set, and is no sample of answers
        for name in {"push_to_hub", "private", "min_agreement"} - given.keys():
            written.pop(name, None)
    if "compare" in given and GIVEN not in given["compare"]:
        written.pop("retention", None)
        written.pop("schedule", None)
    compared = (written | given).get("compare")
    if (
        "method" in given
        and not compared
        and not asks_for_text_tower(Pruning(method=given["method"]))
    ):
        written.pop("text_tower", None)
        written.pop("text_tower_revision", None)
    return made_of(**written | given)


def _forget_resolved(source: str, written: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Leave out what a run resolved for another model or another retention than is given now.

    A run.yaml holds a checkpoint's defaults as if they had been given. Says what is left out.

    Args:
        written: values of the file; changed in place.
        given: values of the flags.
    """
    for name, resolved in (("model", BY_MODEL), ("retention", (SHAPE,))):
        # A file without that name was written by hand, and means what it says.
        if name not in given or name not in written or given[name] == written[name]:
            continue
        gone = [one for one in resolved if one not in given and written.get(one) is not None]
        for one in gone:
            del written[one]
        if gone:
            print(
                f"{source}: {', '.join(gone)} left out, as --{name} is another one now; "
                "give what shall stay as flags",
                file=sys.stderr,
                flush=True,
            )


def fail(prog: str, message: str, code: int) -> int:
    """One line on standard error; returns the exit code."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
