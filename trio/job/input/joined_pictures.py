"""Pictures that lie in files of their own, found by the key that rows have of them.

Several rows ask about one picture, so data sets keep questions and pictures apart. Of the files of
pictures the keys are read once in a process; of the pictures those row groups that a unit needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.storage import open_location

GROUPS = 8
"""Row groups whose pictures are held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFiles:
    """Where they lie."""

    paths: tuple[str, ...]
    key: str
    """Column that names a picture there."""
    image: str
    """Column of the pictures there."""
    by: str
    """Role of the rows' column that holds that name."""
    sizes: tuple[int, ...] = ()
    """Bytes of each file, by which a change is noticed."""

    def check(self) -> None:
        """UserError: a file cannot be read, lacks a column, or names a picture twice."""
        _index(self)


_Place = tuple[str, int, int]
"""File, row group, and row in that."""


@cache
def _index(files: PictureFiles) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for path in files.paths:
        for name, group, row in _keys(path, files):
            if name in places:
                raise UserError(
                    f"{path}: {files.key} {name!r} names two pictures, which cannot be told apart"
                )
            places[name] = (path, group, row)
    return places


def _keys(path: str, files: PictureFiles) -> list[tuple[str, int, int]]:
    location = open_location(path)
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            file = pq.ParquetFile(stream)
            lacking = [n for n in (files.key, files.image) if n not in file.schema_arrow.names]
            if lacking:
                have = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {lacking[0]!r} of pictures; it has {have}")
            groups = range(file.metadata.num_row_groups)
            tables = [file.read_row_group(group, columns=[files.key]) for group in groups]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: pictures cannot be read: {first_line(error)}") from error
    return [
        (str(name), group, row)
        for group, table in enumerate(tables)
        for row, name in enumerate(table.column(files.key).to_pylist())
        if name is not None
    ]


class JoinedPictures:
    """Gives rows their pictures."""

    def __init__(self, files: PictureFiles) -> None:
        self._files = files
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def beside(self, table: pa.Table) -> pa.Table:
        """The rows with a column `image`, null where there is no such picture."""
        index = _index(self._files)
        names = table.column(self._files.by).to_pylist()
        places = [None if name is None else index.get(str(name)) for name in names]
        found: list[pa.Array | None] = [None] * len(places)
        for number, place in sorted(
            ((n, p) for n, p in enumerate(places) if p is not None), key=lambda pair: pair[1]
        ):
            path, group, row = place
            found[number] = self._pictures(path, group).slice(row, 1)
        return table.append_column("image", _joined(found))

    def _pictures(self, path: str, group: int) -> pa.ChunkedArray:
        held = self._groups
        if (path, group) not in held:
            location = open_location(path)
            with location.filesystem.open_input_file(location.path) as stream:
                table = pq.ParquetFile(stream).read_row_group(group, columns=[self._files.image])
            held[path, group] = table.column(0)
            while len(held) > GROUPS:
                held.popitem(last=False)
        held.move_to_end((path, group))
        return held[path, group]


def _joined(found: Sequence[pa.ChunkedArray | None]) -> pa.ChunkedArray:
    kind = next((one.type for one in found if one is not None), pa.binary())
    chunks = [
        chunk for one in found for chunk in (one.chunks if one is not None else [pa.nulls(1, kind)])
    ]
    return pa.chunked_array(chunks, kind)
