"""Rows of work units from their shards: each row group is read once for a run.

INPUT shards as the manifest describes them and units of them; OUTPUT the units' rows as Arrow
tables under the names of the roles, image cells still encoded. Columns are streamed in pieces, so
neither a large row group nor one of many gigabytes is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from trio.errors import first_line
from trio.job.input.listing import MAGIC
from trio.job.input.manifest import Shard
from trio.job.input.units import Unit, group_of
from trio.job.storage import open_location

BATCH_ROWS, BATCH_BYTES = 128, 256 << 20
# decoded at a time while a row group streams past, at the most; Arrow makes nothing of 2 GB nested
BUFFER_BYTES = 4 << 20
# without one, Arrow fetches a column of a row group whole
TRIES = 3
# of a unit, before its rows become errors
ARROW_SCHEMA = b"ARROW:schema"


class ShardUnreadable(Exception):
    """A shard, or the part of it that holds a unit, cannot be read now."""

    kind = "shard_unreadable"


class ShardGone(ShardUnreadable):
    """There is no such file now."""

    kind = "shard_gone"


class ShardChanged(ShardUnreadable):
    """The file is not the one that was planned on, nor is any of its rows."""

    kind = "shard_changed"


class RunReader:
    """Reads units in the order of their rows; the next one goes on where the last one ended."""

    def __init__(
        self,
        shards: Mapping[int, Shard],
        roles: Mapping[str, str],
        again: Callable[[Shard, int, ShardUnreadable], None],
    ) -> None:
        """Prepare.

        Args:
            shards: by number.
            roles: name of the column for each role.
            again: called before a unit is tried again, with its shard, the number of tries so far
                and what was wrong; what it raises ends the reading.
        """
        self._shards, self._roles, self._again = shards, roles, again
        self._cursor: _Cursor | None = None
        self._lost: set[int] = set()
        # numbers of shards that are others now, or gone

    def read(self, unit: Unit) -> pa.Table | ShardUnreadable:
        """The unit's rows, or why they cannot be had."""
        shard = self._shards[unit.shard]
        tries = 1 if unit.shard in self._lost else TRIES
        for tried in range(1, tries + 1):
            try:
                return self._cursor_at(unit).take(unit)
            except Exception as error:
                fault = _fault(error, shard)
            self.close()
            if tried < tries:
                self._again(shard, tried, fault)
        if isinstance(fault, ShardGone | ShardChanged):
            self._lost.add(unit.shard)
        return fault

    def close(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

    def _cursor_at(self, unit: Unit) -> _Cursor:
        if self._cursor is None or not self._cursor.leads_to(unit):
            self.close()
            shard = self._shards[unit.shard]
            self._cursor = _Cursor(shard, self._roles, *group_of(shard.row_groups, unit.start))
        return self._cursor


def _fault(error: Exception, shard: Shard) -> ShardUnreadable:
    if isinstance(error, ShardUnreadable):
        return error
    if isinstance(error, FileNotFoundError):
        return ShardGone(f"{shard.path}: the shard is gone since the run was planned")
    if isinstance(error, OSError | pa.ArrowException):
        return ShardUnreadable(f"{shard.path}: {first_line(error)}")
    raise error


class _Cursor:
    """A place in a shard from which rows are taken going forward."""

    def __init__(self, shard: Shard, roles: Mapping[str, str], group: int, row: int) -> None:
        self._shard = shard
        self.row = row
        # the next one to come
        location = open_location(shard.path)
        self._stream = location.filesystem.open_input_file(location.path)
        self._batches = self._decoded(shard, roles, group)
        self._rest: pa.RecordBatch | None = None

    def leads_to(self, unit: Unit) -> bool:
        """Whether the unit comes next, or later in the row group that is open."""
        first = group_of(self._shard.row_groups, unit.start)[1]
        return unit.shard == self._shard.number and first <= self.row <= unit.start

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

    def _decoded(
        self, shard: Shard, wanted: Mapping[str, str], group: int
    ) -> Generator[pa.RecordBatch]:
        file = _opened(self._stream, wanted)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if self._stream.size() != shard.size or tuple(groups) != shard.row_groups:
            raise ShardChanged(f"{shard.path}: the shard has changed since the run was planned")
        there = file.schema_arrow.names
        roles = {role: name for role, name in wanted.items() if name in there}
        names = sorted(set(roles.values()))
        for number in range(group, len(groups)):
            if groups[number]:
                rows = _batch_rows(file.metadata.row_group(number), names)
                for batch in file.iter_batches(rows, row_groups=[number], columns=names):
                    yield batch.select(list(roles.values())).rename_columns(list(roles))
        raise ShardUnreadable(f"{shard.path}: holds fewer rows than its footer says")


def _opened(stream: pa.NativeFile, roles: Mapping[str, str]) -> pq.ParquetFile:
    """A shard, whose dictionary columns are read as what they stand for.

    Arrow would make one dictionary of all values of a row group, and copy it into every batch. That
    a column was a dictionary says only the Arrow schema in the footer, so there it goes unread.
    """
    file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    wanted = set(roles.values())
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
    columns = map(group.column, range(group.num_columns))
    sizes = (c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max([1, *sizes])))
