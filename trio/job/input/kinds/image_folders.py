"""A folder of image files as shards: each stands for some files, one after the other by name.

A `.txt` or `.json` of an image's name, but for the suffix, lies *beside* it. Which files a shard
stands for is in its name and size, so a listing tells whether they are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    start = len(folder.path.rstrip("/")) + 1
    beside = {info.path: info.size for info in others if info.path.endswith(BESIDE)}
    parts = [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]
    return [
        Found(
            folder.join(f"{number:06d}-{_digest(part, start)}{CHUNK_SUFFIX}"),
            sum(info.size for info in part),
            files=tuple(info.path[start:] for info in part),
            beside=beside,
        )
        for number, part in enumerate(parts)
    ]


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
        yield from ({"id": name, "image": name} for name in found.files)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda name: _row(found, name, notes), found.files)


def bytes_beside(found: Found) -> int:
    """What the files beside a shard's images hold."""
    return sum(size for name in found.files for _, _, size in _beside(found, name))


def _row(found: Found, name: str, notes: Notes) -> dict[str, Any]:
    texts = {
        column: _text(found.location.at(path), size, notes)
        for column, path, size in _beside(found, name)
    }
    return {"id": name, "image": name, **texts}


def _beside(found: Found, name: str) -> Iterator[tuple[str, str, int]]:
    """Column, path and size of each file beside an image."""
    stem = f"{found.location.path.rpartition('/')[0]}/{name}".rpartition(".")[0]
    for suffix in BESIDE:
        if (size := found.beside.get(stem + suffix)) is not None:
            yield suffix[1:], stem + suffix, size


def _text(location: Location, size: int, notes: Notes) -> str | None:
    try:
        data = read_bytes(location) if size <= MOST_TEXT else None
    except (OSError, pa.ArrowException):
        notes.add("files beside images that cannot be read, whose columns are null", location.uri)
        return None
    return text_of(data, location.uri, notes)
