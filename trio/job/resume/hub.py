"""Files of a model: in its directory, else those of a hub id's commit. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from trio.errors import UserError, first_line
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import Model, Settings

TIMEOUT_S = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


class NotHere(UserError):
    """A file of a hub id that neither the hub gives nor the cache holds."""


def pin_revision(config: Settings, earlier: Settings | None = None) -> Settings:
    """Settings that name the commit of each hub id, so that every node, now and later, loads it.

    A run that goes on keeps to the commit it began with, unless another one is asked for.

    Raises:
        UserError: a revision of a directory, or a hub id whose commit cannot be found out.
    """
    pinned = {
        revision: _pinned(config, earlier, model, revision)
        for model, revision in (("model", "revision"), ("text_tower", "text_tower_revision"))
    }
    return config.replace(**pinned)


def _pinned(config: Settings, earlier: Settings | None, model: str, revision: str) -> str | None:
    """The commit of one hub id; `model` and `revision` are the names of its settings."""
    flag, revision_flag = (f"--{name.replace('_', '-')}" for name in (model, revision))
    name, asked = config.get(model), config.get(revision)
    if name is None or model_directory(name) is not None:
        if asked is not None:
            raise UserError(f"{revision_flag} {asked} is for a hub id as {flag}; leave it out")
        return None
    if asked is None and earlier is not None and earlier.get(model) == name:
        asked = earlier.get(revision)
    if _COMMIT.fullmatch(asked or ""):
        return str(asked)
    path = _fetch(name, "config.json", asked, flag)
    if path is None:
        raise UserError(f"{flag} {name}: no config.json there, so it is no model")
    return path.parent.name


def model_file(model: Model, name: str) -> Path | None:
    """A file of a model, None where the model has no such file.

    model: a hub id with its commit.

    Raises:
        NotHere: the hub does not give it, and the cache does not hold it.
    """
    directory = model_directory(model.model)
    if directory is None:
        return _fetch(model.model, name, model.revision, "--model")
    path = Path(directory, name)
    return path if path.is_file() else None


def has_weights(model: Model) -> bool:
    """Whether the cache holds weights of a hub id's commit, so it has been loaded before."""
    path = model_file(model, "config.json")
    return path is not None and any(path.parent.glob("*.safetensors"))


def _fetch(model: str, name: str, revision: str | None, flag: str) -> Path | None:
    """A file of a hub id; without a network, or of a commit, from the cache."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
        if found is _CACHED_NO_EXIST and _COMMIT.fullmatch(revision or ""):
            return None  # what a commit lacks it will not get
        return Path(hf_hub_download(model, name, revision=revision, etag_timeout=TIMEOUT_S))
    except Exception as error:  # without a network it depends on the client's version
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise NotHere(
            f"{flag} {model}: the hub does not give {name} ({first_line(error)}), and it is not in"
            " the cache; check the name, its revision, your access to it and HF_TOKEN, or give a"
            " directory"
        ) from error
