"""What a checkpoint decides in a run's settings, so that run.yaml holds it: the values of its
`pruning_config.json`, and the dtype."""

from __future__ import annotations

import json

from trio.decoder.default_dtype import on_a_cpu, on_a_gpu, saved_dtype
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


def dtype_resolved(config: Settings, *, gpu: bool) -> tuple[Settings, str | None]:
    """Settings in which the dtype is written out, and a line that says why; None where it was
    asked for.

    Decided once, where the job starts: all engines of a run compute alike, on whatever machine.
    """
    if config.model.dtype != "auto":
        return config, None
    try:
        path = model_file(config.model, "config.json")
        saved = saved_dtype(json.loads(path.read_bytes())) if path is not None else None
    except (NotHere, OSError, ValueError):  # engines say what is wrong with it
        saved = None
    name, why = (on_a_gpu if gpu else on_a_cpu)(saved)
    return config.replace(dtype=name), f"dtype {name}: {why}"
