"""Rows of work units from their shards, in an actor: each row group is read once for a run.

INPUT a shard as the manifest describes it and units of it; OUTPUT the units' rows as Arrow tables
under the names of the roles, image cells still encoded. Columns are streamed in pieces, so neither
a large row group nor one of many gigabytes is ever held whole.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from trio.errors import UserError, first_line
from trio.job.input.columns import Columns
from trio.job.input.listing import MAGIC
from trio.job.input.manifest import Shard
from trio.job.input.units import Unit, group_of
from trio.job.storage import open_location

BATCH_ROWS, BATCH_BYTES = 128, 256 << 20
# decoded at a time while a row group streams past, at the most; Arrow makes nothing of 2 GB nested
BUFFER_BYTES = 4 << 20
# without one, Arrow fetches a column of a row group whole
OPEN_CURSORS = 2
ARROW_SCHEMA = b"ARROW:schema"


class ShardUnreadable(Exception):
    """A shard, or the part of it that holds a unit, cannot be read now."""

    kind = "shard_unreadable"


class ShardGone(ShardUnreadable):
    """There is no such file now."""

    kind = "shard_gone"


class ShardChanged(ShardUnreadable, UserError):
    """The file is not the one that the manifest describes: none of its rows is that which was
    planned. A user's mistake for who reads once."""

    kind = "shard_changed"


class UnitReader:
    """Reads units; goes on where it was if the next unit follows in the same row group.

    Calls may come from several threads; each brings its turn (0, 1, 2, ...), and reads happen in
    that order, since threads that start in order need not arrive in it.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._cursors: list[_Cursor] = []
        self._turn = 0
        self._changed = threading.Condition()

    def read(self, shard: Shard, unit: Unit, turn: int | None = None) -> pa.Table:
        """The unit's rows; without a turn, whenever nobody else reads.

        Raises:
            ShardUnreadable: no way to read it; another try may succeed.
            ShardGone: it is not there; on a node that is new it may come.
            ShardChanged: it is not the one that the manifest describes.
        """
        with self._changed:
            if turn is None:
                return self._read(shard, unit)
            self._changed.wait_for(lambda: self._turn == turn)
            try:
                return self._read(shard, unit)
            finally:
                self._turn += 1
                self._changed.notify_all()

    def _read(self, shard: Shard, unit: Unit) -> pa.Table:
        cursor = None
        try:
            cursor = self._cursor_at(shard, unit)
            return cursor.take(unit)
        except Exception as error:
            if cursor is not None:
                self._cursors.remove(cursor)
                cursor.close()
            if isinstance(error, FileNotFoundError):
                said = f"{shard.path}: the shard is gone since the run was planned"
                raise ShardGone(said) from error
            if isinstance(error, OSError | pa.ArrowException):
                raise ShardUnreadable(f"{shard.path}: {first_line(error)}") from error
            raise

    def _cursor_at(self, shard: Shard, unit: Unit) -> _Cursor:
        group, first = group_of(shard.row_groups, unit.start)
        for cursor in self._cursors:
            if cursor.path == shard.path and max(first, cursor.row) == cursor.row <= unit.start:
                self._cursors.remove(cursor)
                break
        else:
            cursor = _Cursor(shard, self._columns, group, first)
        self._cursors.append(cursor)
        while len(self._cursors) > OPEN_CURSORS:
            self._cursors.pop(0).close()
        return cursor


class _Cursor:
    """A place in a shard from which rows are taken going forward."""

    def __init__(self, shard: Shard, columns: Columns, group: int, row: int) -> None:
        self.path = shard.path
        self.row = row
        # the next one to come
        location = open_location(shard.path)
        self._stream = location.filesystem.open_input_file(location.path)
        self._batches = self._decoded(shard, columns, group)
        self._rest: pa.RecordBatch | None = None

    def take(self, unit: Unit) -> pa.Table:
        """Rows [start, stop); those before are passed over."""
        parts: list[pa.RecordBatch] = []
        while self.row < unit.stop:
            if self._rest is None:
                self._rest = next(self._batches)
            batch, until = self._rest, unit.start if self.row < unit.start else unit.stop
            length = min(batch.num_rows, until - self.row)
            if self.row >= unit.start:
                parts.append(batch.slice(0, length))
            self._rest = batch.slice(length) if length < batch.num_rows else None
            self.row += length
        return pa.Table.from_batches(parts)

    def close(self) -> None:
        self._batches.close()
        self._stream.close()

    def _decoded(self, shard: Shard, columns: Columns, group: int) -> Generator[pa.RecordBatch]:
        file = _opened(self._stream, columns)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if self._stream.size() != shard.size or tuple(groups) != shard.row_groups:
            raise ShardChanged(f"{shard.path}: the shard has changed since the run was planned")
        there = file.schema_arrow.names
        roles = {role: name for role, name in columns.roles.items() if name in there}
        names = sorted(set(roles.values()))
        for number in range(group, len(groups)):
            if groups[number]:
                rows = _batch_rows(file.metadata.row_group(number), names)
                for batch in file.iter_batches(rows, row_groups=[number], columns=names):
                    yield batch.select(list(roles.values())).rename_columns(list(roles))
        raise ShardUnreadable(f"{shard.path}: holds fewer rows than its footer says")


def _opened(stream: pa.NativeFile, columns: Columns) -> pq.ParquetFile:
    """A shard, whose dictionary columns are read as what they stand for.

    Arrow would make one dictionary of all values of a row group, and copy it into every batch. That
    a column was a dictionary says only the Arrow schema in the footer, so there it goes unread.
    """
    file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    wanted = set(columns.roles.values())
    if not any(_has_dictionary(f.type) for f in file.schema_arrow if f.name in wanted):
        return file
    stream.seek(stream.size() - 8)
    end = stream.read(8)
    length = int.from_bytes(end[:4], "little")
    stream.seek(stream.size() - 8 - length)
    footer = stream.read(length).replace(ARROW_SCHEMA, ARROW_SCHEMA.lower())
    metadata = pq.read_metadata(pa.BufferReader(MAGIC + footer + end))
    return pq.ParquetFile(stream, metadata=metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _has_dictionary(kind: pa.DataType) -> bool:
    inner = (kind.field(number).type for number in range(kind.num_fields))
    return pt.is_dictionary(kind) or any(map(_has_dictionary, inner))


def _batch_rows(group: pq.RowGroupMetaData, names: Collection[str]) -> int:
    """Rows to decode at a time: no value is larger than its column's pages, unpacked, are."""
    columns = (group.column(number) for number in range(group.num_columns))
    sizes = (c.total_uncompressed_size for c in columns if _top(c.path_in_schema, names))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max([1, *sizes])))


def _top(path: str, names: Collection[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
