"""Finds `pruning_config.json` of a loaded model; fetches nothing."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from trio.pruning.pruning_config import FILE, PruningDefaults, read, read_file

_log = logging.getLogger(__name__)


def defaults_of(model: Any) -> PruningDefaults:
    """Of the checkpoint that a model was loaded from: its directory, or its snapshot in the cache
    of the hub; empty for a model from anywhere else. Where the cache does not know whether a hub's
    model has the file, one line says so.

    Raises:
        UserError: the file is broken.
    """
    name = getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "")
    if not isinstance(name, str) or not name:
        return PruningDefaults()
    if os.path.isdir(name):
        return read(name)
    # Of plain transformers from 5.24 on nothing tells the revision: then it is the main branch.
    commit = getattr(model.config, "_commit_hash", None)
    try:
        found = try_to_load_from_cache(name, FILE, revision=commit)
    except HFValidationError:  # a directory that is gone, say
        return PruningDefaults()
    if isinstance(found, str):
        return read_file(Path(found))
    if found is None:  # otherwise it is known not to be there
        _tell_unknown(name, commit)
    return PruningDefaults()


@cache
def _tell_unknown(name: str, revision: str | None) -> None:
    """Once for each model in a process."""
    which = "" if revision is None else f" --revision {revision}"
    _log.warning(
        f"{FILE} of {name}: the hub's cache here does not know whether there is one: built-in "
        f"pruning defaults; `hf download {name} {FILE}{which}` asks the hub, as does "
        "trio.Engine.from_pretrained"
    )
