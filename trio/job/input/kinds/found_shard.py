"""A shard as a listing finds it, before it is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trio.job.input.kinds.shard_kinds import PARQUET, kind_of
from trio.job.storage import Location, bare


@dataclass(frozen=True, slots=True)
class Found:
    """Where it is, and how large."""

    location: Location
    size: int
    # bytes; of images the sum of their files'
    files: tuple[str, ...] = ()
    # of images: their paths from the folder
    beside: Mapping[str, int] = field(default_factory=dict)
    # of images: sizes of .txt and .json files, by path
    above: str = ""
    # of images: the partitions' directories that the folder is, as ids begin

    @property
    def kind(self) -> str:
        """Parquet where the name says nothing."""
        return kind_of(self.location.path) or PARQUET

    @property
    def paths(self) -> list[str]:
        """Of its files."""
        if not self.files:
            return [self.location.uri]
        folder = self.location.path.rpartition("/")[0]
        return [self.location.at(f"{folder}/{name}").uri for name in self.files]


def shared_directory(paths: Sequence[str]) -> str | None:
    """What the paths or URIs of shards begin with, up to a ``/``, if file names alone do not tell
    them apart; None if they do."""
    paths = [bare(path) for path in paths]
    if len({path.rpartition("/")[2] for path in paths}) == len(paths):
        return None
    # By characters, and cut at a "/" then: paths and URIs may come together.
    alike = os.path.commonprefix(paths)  # noqa: RUF071
    return alike[: alike.rfind("/") + 1]


def row_names(found: Sequence[Found]) -> list[str]:
    """What ids call each shard: its file's name, with as much of the path as tells them apart."""
    paths = [one.location.uri for one in found]
    shared = shared_directory(paths)
    return [row_name(path, shared) for path in paths]


def row_name(path: str, shared: str | None) -> str:
    """The same of one path or URI; `shared`: the `shared_directory` of all."""
    path = bare(path)
    return path.rpartition("/")[2] if shared is None else path.removeprefix(shared)
