"""A checkpoint's `pruning_config.json` in a run's settings, so that run.yaml holds its values."""

from __future__ import annotations

from pathlib import Path

from trio.errors import UserError, first_line
from trio.job.resume.fingerprint import HUB_TIMEOUT_S, model_directory
from trio.job.settings import Settings
from trio.pruning import pruning_config as defaults
from trio.pruning.pruning_config import FILE, PruningDefaults


def pruning_resolved(config: Settings) -> Settings:
    """Settings in which all that steers the choice of tokens is written out.

    Raises:
        UserError: the checkpoint's file is broken, or cannot be fetched.
    """
    directory = model_directory(config.model.model)
    if directory is not None:
        return config.with_pruning_defaults(defaults.read(directory))
    return config.with_pruning_defaults(of_hub(config.model.model, config.model.revision))


def of_hub(model: str, revision: str | None) -> PruningDefaults:
    """Of a hub id: from the cache, else fetched.

    Raises:
        UserError: whether it has such a file cannot be found out, or the file is broken.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = try_to_load_from_cache(model, FILE, revision=revision)
    if isinstance(found, str):
        return defaults.read_file(Path(found))
    if found is not None:  # known not to be there
        return PruningDefaults()
    try:
        path = hf_hub_download(model, FILE, revision=revision, etag_timeout=HUB_TIMEOUT_S)
    except LocalEntryNotFoundError as error:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            # Without a network a model that was downloaded before goes on working.
            print(f"{FILE} of {model} is not in the cache: built-in pruning defaults", flush=True)
            return PruningDefaults()
        raise UserError(
            f"{FILE} of {model}: the hub does not answer ({first_line(error)})"
        ) from error
    except EntryNotFoundError:
        return PruningDefaults()
    except Exception as error:  # gated, no access, or what a library of HTTP raises
        raise UserError(
            f"{FILE} of {model} cannot be fetched from the hub ({first_line(error)}); check the "
            "name, --revision, your access to it and HF_TOKEN"
        ) from error
    return defaults.read_file(Path(path))
