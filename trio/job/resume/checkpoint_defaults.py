"""A checkpoint's `pruning_config.json` in a run's settings, so that run.yaml holds its values."""

from __future__ import annotations

from trio.job.resume.hub import NotHere, has_weights, model_file
from trio.job.settings import Settings
from trio.pruning.pruning_config import FILE, PruningDefaults, read_file


def pruning_resolved(config: Settings) -> Settings:
    """Settings in which all that steers the choice of tokens is written out.

    config: with a hub id's commit.

    Raises:
        UserError: the checkpoint's file is broken, or whether there is one cannot be found out.
    """
    try:
        path = model_file(config.model, FILE)
    except NotHere:
        if not has_weights(config.model):
            raise
        # Without a network a model that was downloaded before goes on working.
        print(f"{FILE} of {config.model.model} is not in the cache: built-in pruning defaults")
        path = None
    return config.with_pruning_defaults(PruningDefaults() if path is None else read_file(path))
