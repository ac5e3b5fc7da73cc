"""The command line that inference jobs share: flags from the settings' fields, one-line errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from trio.errors import UserError
from trio.pipeline import config as settings
from trio.pipeline.config import FIELDS, JobConfig
from trio.pruning.pruning_config import CHOICES, SHAPE

OK, FAILED, WRONG, ERRORS = 0, 1, 2, 3
BY_MODEL = (*CHOICES, SHAPE, "revision")
"""Settings that a run resolves by its model."""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, so that all of them read the same."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all flags)")


def parser(prog: str, description: str, epilog: str) -> Parser:
    out = Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(out, FIELDS)
    return out


def add_flags(out: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Flags of these settings, for `settings_from`, --config and --dry-run."""
    for name in names:
        _add_flag(out, name, dict(FIELDS[name].metadata), FIELDS[name].default)
    out.add_argument(
        "--config",
        metavar="FILE",
        help="settings from a run.yaml; flags given beside it win",
    )
    out.add_argument("--dry-run", action="store_true", help="print what would be done, then stop")


def _add_flag(out: argparse.ArgumentParser, name: str, meta: dict[str, Any], default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    text = str(meta["help"]).replace("%", "%%")
    if meta["unit"]:
        text += f" [{meta['unit']}]"
    if default is not None and not isinstance(default, bool) and "(default" not in text:
        shown = " ".join(default) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    extra: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    if isinstance(default, bool) or name == "compare_unpruned":
        out.add_argument(flag, action=argparse.BooleanOptionalAction, **extra)
        return
    metavar = meta["metavar"] or name.rpartition("_")[2].upper()
    several: dict[str, Any] = (
        {"nargs": "+", "action": "extend"} if isinstance(default, tuple) else {}
    )
    out.add_argument(flag, metavar=metavar, **several, **extra)


def settings_from(args: argparse.Namespace, base: JobConfig | None = None) -> JobConfig:
    """Settings from --config and flags.

    Raises:
        UserError: anything in them that is wrong.
    """
    given = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    values: dict[str, Any] = {}
    if args.config:
        values = settings.load(args.config)
        written = settings.from_mapping(values, f"--config {args.config}", base)
        _forget_resolved(args.config, values, written, given)
    if "retention" in given:
        values.pop("schedule", None)
    if "schedule" in given:
        values.pop("retention", None)
    if given.get("method", "eadp") != "eadp":
        values.pop("text_tower", None)
        values.pop("text_tower_revision", None)
    merged = settings.from_mapping(values, f"--config {args.config}", base)
    for name, value in given.items():
        try:
            given[name] = FIELDS[name].metadata["parse"](value)
        except UserError as error:
            raise UserError(f"--{name.replace('_', '-')}: {error}") from error
    return merged.replace(**given)


def _forget_resolved(
    path: str, values: dict[str, Any], written: JobConfig, given: Mapping[str, Any]
) -> None:
    """Leave out what a run resolved for another model or another retention than is given now.

    A run.yaml holds a checkpoint's defaults as if they had been given. Says what is left out.

    Args:
        values: of the file; changed in place.
        written: the same, parsed.
        given: flags, not yet parsed.
    """
    for name, resolved in (("model", BY_MODEL), ("retention", (SHAPE,))):
        # A file without that name was written by hand, and means what it says.
        if name not in given or name not in values or _is_same(name, given, written):
            continue
        gone = [one for one in resolved if one not in given and values.get(one) is not None]
        for one in gone:
            del values[one]
        if gone:
            print(
                f"--config {path}: {', '.join(gone)} left out, as --{name} is another one now; "
                "give what shall stay as flags",
                file=sys.stderr,
                flush=True,
            )


def _is_same(name: str, given: Mapping[str, Any], written: JobConfig) -> bool:
    try:
        return bool(FIELDS[name].metadata["parse"](given[name]) == getattr(written, name))
    except UserError:  # told with the flag's name later on
        return True


def fail(prog: str, message: str, code: int) -> int:
    """One line on standard error; returns the exit code."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
