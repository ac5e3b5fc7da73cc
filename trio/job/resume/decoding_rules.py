"""The model's rules of decoding as its files say them, for what a run prints and notes. No torch.

Engines read them with the model; here they are read before any starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trio.engine.decoding.generation_rules import FILE, Rules
from trio.errors import UserError, first_line
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import Settings

PLAIN = "decoding: greedy"


def read(config: Settings) -> Rules | None:
    """The model's rules; None where a hub's files cannot be had on this machine.

    config: with a hub id's commit.

    Raises:
        UserError: the file is damaged, or a rule in it makes no sense.
    """
    directory = model_directory(config.model.model)
    try:
        said = _json(config, directory, FILE)
        if said is None:  # as transformers does for checkpoints from before there was that file
            said = {"_from_model_config": True} | (_json(config, directory, "config.json") or {})
    except _NotHere:
        return None
    return Rules.read(said)


def lines(config: Settings, rules: Rules | None) -> list[str]:
    """How answers are decoded, and what the model's file asks for that is not followed."""
    if rules is None:
        return [
            f"decoding: {FILE} of {config.model.model} is read by the engines alone, not to be had"
            " here"
        ]
    told = f"decoding: {rules.describe(config.sampling)}"
    return [told] if rules.notice is None else [told, rules.notice]


class _NotHere(Exception):
    """A file of the hub that can be had neither from it nor from the cache."""


def _json(config: Settings, directory: str | None, name: str) -> dict[str, Any] | None:
    """A file's content, None where the model has no such file."""
    path = _of_hub(config, name) if directory is None else Path(directory, name)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {first_line(error)}; copy or download it again"
        ) from error
    return content


def _of_hub(config: Settings, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(config.model.model, name, revision=config.model.revision))
    except LocalEntryNotFoundError as error:
        raise _NotHere from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # without network it depends on the client's version
        raise _NotHere from error
