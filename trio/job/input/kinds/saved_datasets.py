"""Files of a data set of the library `datasets`: a repository of the Hub, or what `save_to_disk`
wrote; of its configurations (`--subset`) and splits one is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow.fs import FileInfo

from trio.errors import UserError, first_line
from trio.job.storage import Location, read_bytes

HUB = "hf://"
_REPOSITORY = re.compile(r"hf://(datasets/[^/*?\[]+/[^/*?\[@]+)(@[^/*?\[]+)?/?")
SPLITS, STATE, FILES = "dataset_dict.json", "state.json", "_data_files"
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Part:
    """Of a data set."""

    subset: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        given = {"--subset": self.subset, "--split": self.split}
        return " ".join(f"{flag} {name}" for flag, name in given.items() if name is not None)


WHOLE = Part()


def data_set_files(
    uri: str, location: Location, infos: Sequence[FileInfo], part: Part
) -> list[FileInfo] | None:
    """The files of the part among those of an input; None where it is no such data set.

    Args:
        uri: the input.
        location: the same.
        infos: all files there.
        part: which is wanted.

    Raises:
        UserError: several parts and none named, one that is not there, or files that say nothing.
    """
    if (match := _REPOSITORY.fullmatch(uri)) is not None:
        wanted = {_path(name, match[2]) for name in hub_files(uri, match, part)}
        return _among(uri, infos, wanted)
    root = location.path.rstrip("/")
    there = {info.path for info in infos}
    if f"{root}/{SPLITS}" in there and (whole := _read(location.join(SPLITS), "splits")):
        split = _one_of(uri, "--split", part.split, whole["splits"])
        return _saved(uri, location.join(split), infos, Part(part.subset))
    if f"{root}/{STATE}" in there and _read(location.join(STATE), FILES):
        return _saved(uri, location, infos, part)
    return None


def _saved(uri: str, location: Location, infos: Sequence[FileInfo], part: Part) -> list[FileInfo]:
    state = _read(location.join(STATE), FILES)
    if state is None:
        raise UserError(f"--input {uri}: {location.join(STATE).uri} names no data files")
    if part.subset is not None:
        raise UserError(f"{part}: {uri} is a saved data set, which has no configurations")
    if part.split is not None:
        _one_of(uri, "--split", part.split, [name for name in [state.get("_split")] if name])
    names = [file["filename"] for file in state[FILES]]
    return _among(uri, infos, {location.join(name).path for name in names})


def _read(location: Location, key: str) -> dict[str, Any] | None:
    """What `datasets` wrote, of which the key tells; None for what others call so."""
    try:
        value = json.loads(read_bytes(location))
    except (OSError, ValueError) as error:
        raise UserError(f"{location.uri}: cannot be read ({first_line(error)})") from error
    return value if isinstance(value, dict) and isinstance(value.get(key), list) else None


def _among(uri: str, infos: Sequence[FileInfo], wanted: set[str]) -> list[FileInfo]:
    found = [info for info in infos if info.path in wanted]
    if missing := sorted(wanted - {info.path for info in found}):
        raise UserError(f"--input {uri}: {missing[0]} is not there")
    return found


def _one_of(uri: str, flag: str, asked: str | None, names: Sequence[str]) -> str:
    """The one that is asked for, or the only one."""
    if asked is None and len(names) == 1:
        return names[0]
    if asked in names:
        return str(asked)
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    wrong = "several are there" if asked is None else f"{asked} is not there"
    raise UserError(f"--input {uri}: {wrong}; give as {flag} one of {shown or 'none'}")


def hub_files(uri: str, match: re.Match[str], part: Part) -> list[str]:
    """URIs of a repository's files, as the Hub names them."""
    name, revision = match[1].removeprefix("datasets/"), (match[2] or "@")[1:]
    return files_of(name, uri, part, revision or None)


def files_of(place: str, uri: str, part: Part, revision: str | None = None) -> list[str]:
    """Files of one configuration and split, as `datasets` finds them; none is downloaded.

    Args:
        place: repository or local directory.
        uri: for messages.
        part: which is wanted.
        revision: of the repository.

    Raises:
        UserError: several parts and none named, one that is not there, or no data set.
    """
    import datasets  # seconds

    try:
        subsets = datasets.get_dataset_config_names(place, revision=revision)
        subset = _one_of(uri, "--subset", part.subset, subsets)
        builder = datasets.load_dataset_builder(place, subset, revision=revision)
        files = builder.config.data_files or {}
    except UserError:
        raise
    except Exception as error:  # whatever the library and its many dependencies raise
        raise UserError(f"--input {uri}: no data set to be read ({first_line(error)})") from error
    split = _one_of(uri, "--split", part.split, [str(name) for name in files])
    return [str(name) for name in files[split]]


def _path(name: str, revision: str | None) -> str:
    """Of a file on the Hub, as our listing has it: with the commit only if the input names one."""
    path = name.removeprefix(HUB)
    return re.sub(r"^(datasets/[^/]+/[^/@]+)@[^/]+", rf"\1{revision or ''}", path)
