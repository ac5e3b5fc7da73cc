"""Settings as ``run.yaml``: flat keys, the same names as the flags."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trio.errors import UserError
from trio.job.settings import FIELDS, Settings, made_of


def load(path: str) -> dict[str, Any]:
    """Keys and values of a YAML file, not yet checked.

    Raises:
        UserError: no such file, not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of the form 'key: value'")
    return values


def checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The same values, each read.

    Raises:
        UserError: unknown keys, values of a wrong kind; names the source.
    """
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise UserError(f"{source}: unknown key {unknown[0]!r}{suggestion(unknown[0], FIELDS)}")
    return {name: _checked(name, value, source) for name, value in values.items()}


def _checked(name: str, value: Any, source: str) -> Any:
    if value is None:
        # None in what `flat` gives is what may be left open.
        if _DEFAULTS[name] is None:
            return None
        raise UserError(f"{source}: {name} is empty; leave it out for its default")
    try:
        return FIELDS[name].value.read(value)
    except UserError as error:
        raise UserError(f"{source}: {name}: {error}") from error


def settings_of_mapping(values: Mapping[str, Any], source: str) -> Settings:
    """Settings of a file's values.

    Raises:
        UserError: as of `checked`, and settings that exclude each other.
    """
    return made_of(**checked(values, source))


def dump(settings: Settings, comment: str = "") -> str:
    """The text of ``run.yaml``, which ``--config`` reads back to the same settings."""
    body: str = yaml.safe_dump(settings.flat(), sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + body


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a word that is nearly a known one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_DEFAULTS = Settings().flat()
