"""Where a loaded model's `pruning_config.json` lies; nothing is fetched here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from trio.pruning.defaults import FILE, PruningDefaults, read, read_file


def defaults_of(model: Any) -> PruningDefaults:
    """Of the checkpoint that a model was loaded from: its directory, or its snapshot in the cache
    of the hub; empty for a model from anywhere else.

    Raises:
        UserError: the file is broken.
    """
    name = getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "")
    if not isinstance(name, str) or not name:
        return PruningDefaults()
    if os.path.isdir(name):
        return read(name)
    commit = getattr(model.config, "_commit_hash", None)
    try:
        found = try_to_load_from_cache(name, FILE, revision=commit)
    except HFValidationError:  # a directory that is gone, say
        return PruningDefaults()
    return read_file(Path(found)) if isinstance(found, str) else PruningDefaults()
