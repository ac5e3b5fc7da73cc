"""A folder of image files as shards: each stands for some files, one after the other by name.

A `.txt` or `.json` of an image's name, but for the suffix, lies *beside* it. Which files a shard
stands for is in its name and size, so a listing tells whether they are the same. Each partition
(`day=1/`) is a folder of its own, as partitions are found in the paths of shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo

from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.raw_rows import MOST_TEXT, Notes, text_of
from trio.job.input.kinds.shard_kinds import CHUNK_SUFFIX
from trio.job.storage import Location, read_bytes

CHUNK = 4096
"""Images of a shard."""
THREADS = 8
# that read what lies beside
BESIDE = (".txt", ".json")


def chunks(folder: Location, images: Sequence[FileInfo], others: Sequence[FileInfo]) -> list[Found]:
    """Shards of the images below a folder; `others` are files there that may lie beside them."""
    top = folder.path.rstrip("/") + "/"
    beside = {info.path: info.size for info in others if info.path.endswith(BESIDE)}
    out: list[Found] = []
    for above, some in groupby(images, lambda info: _partitions(info.path[len(top) :])):
        mine, start = list(some), len(top + above)
        for part in (mine[first : first + CHUNK] for first in range(0, len(mine), CHUNK)):
            name = f"{len(out):06d}-{_digest(part, start)}{CHUNK_SUFFIX}"
            files, size = tuple(i.path[start:] for i in part), sum(i.size for i in part)
            out.append(Found(folder.at(top + above + name), size, files, beside, above))
    return out


def _partitions(path: str) -> str:
    """Of a path, the directories down to the last that is a partition."""
    *folders, _ = path.split("/")
    last = max((number for number, name in enumerate(folders, 1) if "=" in name), default=0)
    return "".join(f"{name}/" for name in folders[:last])


def _digest(part: Sequence[FileInfo], start: int) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for info in part:
        digest.update(f"{info.path[start:]}\0{info.size}\0".encode())
    return digest.hexdigest()


def lies_beside(path: str, stems: Collection[str]) -> bool:
    """Whether a file is one beside an image; `stems` are the images' paths without suffixes."""
    return path.endswith(BESIDE) and path.rpartition(".")[0] in stems


def image_rows(found: Found, notes: Notes) -> Iterator[dict[str, Any]]:
    """Raw rows of a shard; their images are paths from the folder."""
    if not found.beside:
        yield from ({"id": found.above + name, "image": name} for name in found.files)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda name: _row(found, name, notes), found.files)


def bytes_beside(found: Found) -> int:
    """What the files beside a shard's images hold."""
    return sum(size for name in found.files for _, _, size in _beside(found, name))


def _row(found: Found, name: str, notes: Notes) -> dict[str, Any]:
    texts = {
        column: _text(found, found.location.at(path), size, notes)
        for column, path, size in _beside(found, name)
    }
    return {"id": found.above + name, "image": name, **texts}


def _beside(found: Found, name: str) -> Iterator[tuple[str, str, int]]:
    """Column, path and size of each file beside an image."""
    stem = f"{found.location.path.rpartition('/')[0]}/{name}".rpartition(".")[0]
    for suffix in BESIDE:
        if (size := found.beside.get(stem + suffix)) is not None:
            yield suffix[1:], stem + suffix, size


def _is_below(path: str, folder: str) -> bool:
    """Links followed, as with images."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _text(found: Found, location: Location, size: int, notes: Notes) -> str | None:
    if location.local and not _is_below(location.path, found.location.path.rpartition("/")[0]):
        notes.add(
            "files beside images that are links out of their folder, read as null", location.uri
        )
        return None
    try:
        data = read_bytes(location) if size <= MOST_TEXT else None
    except (OSError, pa.ArrowException):
        notes.add("files beside images that cannot be read, whose columns are null", location.uri)
        return None
    return text_of(data, location.uri, notes)
