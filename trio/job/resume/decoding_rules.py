"""The model's rules of decoding as its files say them, for what a run prints and notes. No torch.

Engines read them with the model; here they are read before any starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trio.engine.decoding.generation_rules import FILE, Rules
from trio.errors import UserError, first_line
from trio.job.resume.hub import NotHere, model_file
from trio.job.settings import Settings

PLAIN = "decoding: greedy"


def read(config: Settings) -> Rules | None:
    """The model's rules; None where a hub's files cannot be had on this machine.

    config: with a hub id's commit.

    Raises:
        UserError: the file is damaged, or a rule in it makes no sense.
    """
    try:
        path = model_file(config.model, FILE)
        if path is not None:
            return Rules.read(_json(path))
        # As transformers does for checkpoints from before there was that file.
        path = model_file(config.model, "config.json")
        return Rules.read({"_from_model_config": True} | (_json(path) if path else {}))
    except NotHere:
        return None


def lines(config: Settings, rules: Rules | None) -> list[str]:
    """How answers are decoded, and what the model's file asks for that is not followed."""
    if rules is None:
        return [
            f"decoding: {FILE} of {config.model.model} is read by the engines alone, not to be had"
            " here"
        ]
    told = f"decoding: {rules.describe(config.sampling)}"
    return [told] if rules.notice is None else [told, rules.notice]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {first_line(error)}; copy or download it again"
        ) from error
    return content
