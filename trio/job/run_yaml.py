"""Settings as ``run.yaml``: flat keys, the same names as the flags."""

from __future__ import annotations

from typing import Any

import yaml

from trio.errors import UserError, suggestion
from trio.job.settings import FIELDS, Settings


def parse(text: str | bytes, source: str) -> dict[str, Any]:
    """Values by name of a file's text, each read; `source` is the file's name for messages.

    Raises:
        UserError: not YAML, no mapping, unknown keys, or values of a wrong kind.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected lines of the form 'key: value'")
    _renew(values)
    unknown = next((name for name in values if name not in FIELDS), None)
    if unknown is not None:
        raise UserError(f"{source}: unknown key {unknown!r}{suggestion(str(unknown), FIELDS)}")
    return {name: _read(name, value, source) for name, value in values.items()}


def _renew(values: dict[str, Any]) -> None:
    """Keys of earlier versions, as they are now."""
    if values.pop("compare_unpruned", None):
        values.setdefault("compare", ["1", "given"])


def _read(name: str, value: Any, source: str) -> Any:
    if value is None:
        # None in what `flat` gives is what may be left open.
        if _DEFAULTS[name] is None:
            return None
        raise UserError(f"{source}: {name} is empty; leave it out for its default")
    try:
        return FIELDS[name].value.read(value)
    except UserError as error:
        raise UserError(f"{source}: {name}: {error}") from error


def dump(settings: Settings, comment: str = "") -> str:
    """The text of ``run.yaml``, which ``--config`` reads back to the same settings."""
    values = settings.flat()
    if settings.questions.mode is None:  # as of captions, which ask none
        values = {n: value for n, value in values.items() if FIELDS[n].group != "questions"}
    body: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + body


_DEFAULTS = Settings().flat()
