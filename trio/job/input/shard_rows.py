"""Rows of one shard, whatever its kind, under the names of its own columns.

Parquet, and the index of what is none, is streamed in pieces, so neither a large row group nor one
of many gigabytes is ever held whole; of an Arrow stream one record batch is.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from trio.job.input.kinds import arrow_streams
from trio.job.input.kinds.arrow_streams import Batch
from trio.job.input.kinds.shard_kinds import ARROW
from trio.job.input.listing import MAGIC
from trio.job.input.manifest import Shard
from trio.job.storage import open_location

BATCH_ROWS, BATCH_BYTES = 128, 256 << 20
# decoded at a time while a row group streams past, at the most; Arrow makes nothing of 2 GB nested
BUFFER_BYTES = 4 << 20
# without one, Arrow fetches a column of a row group whole
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


def rows_from(shard: Shard, names: Collection[str], group: int = 0) -> Generator[pa.RecordBatch]:
    """Those of the columns that the shard has, from the first row of a row group on.

    Raises:
        ShardUnreadable: it is another one than was planned on.
        OSError: it cannot be read.
        pa.ArrowException: the same.
    """
    if shard.kind == ARROW:
        yield from _of_arrow(shard, names, group)
    else:
        yield from _of_parquet(shard, names, group)


def first_rows(shard: Shard, names: Collection[str], count: int) -> pa.Table | None:
    """The shard's first rows, `count` at most; None where it has none."""
    parts: list[pa.RecordBatch] = []
    coming = rows_from(shard, names)
    while sum(part.num_rows for part in parts) < min(count, shard.rows):
        parts.append(next(coming))
    coming.close()
    return pa.Table.from_batches(parts).slice(0, count) if parts else None


def column_of(shard: Shard, name: str) -> pa.ChunkedArray:
    """A whole column of a shard that has rows, which is held in memory."""
    if shard.kind == ARROW:
        table = first_rows(shard, [name], shard.rows)
        assert table is not None
        return table.column(name)
    with _stream_of(shard) as stream:
        return pq.ParquetFile(stream).read(columns=[name], use_threads=False).column(name)


def _stream_of(shard: Shard) -> pa.NativeFile:
    """Of its Parquet file."""
    location = open_location(shard.parquet)
    try:
        return location.filesystem.open_input_file(location.path)
    except FileNotFoundError as error:
        if not shard.index:
            raise
        raise ShardGone(f"{shard.path}: {shard.index}, its index, is gone") from error


def check_size(stream: pa.NativeFile, shard: Shard) -> None:
    if stream.size() != shard.size:
        raise ShardChanged(f"{shard.path}: the shard has changed since the run was planned")


def _of_parquet(shard: Shard, wanted: Collection[str], group: int) -> Generator[pa.RecordBatch]:
    with _stream_of(shard) as stream:
        file = _opened(stream, wanted)
        meta = file.metadata
        lengths = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if not shard.index:
            check_size(stream, shard)
        if tuple(lengths) != shard.row_groups:
            raise ShardChanged(f"{shard.path}: the shard has changed since the run was planned")
        names = sorted(set(wanted).intersection(file.schema_arrow.names))
        for number in range(group, len(lengths)):
            if lengths[number]:
                rows = _batch_rows(meta.row_group(number), names)
                yield from file.iter_batches(rows, row_groups=[number], columns=names)
    raise ShardUnreadable(f"{shard.path}: holds fewer rows than its footer says")


def _of_arrow(shard: Shard, wanted: Collection[str], group: int) -> Generator[pa.RecordBatch]:
    with _stream_of(shard) as stream:
        places = pq.ParquetFile(stream).read().slice(group)
    with arrow_streams.opened(open_location(shard.path)) as stream:
        check_size(stream, shard)
        schema = arrow_streams.schema_of(stream)
        names = sorted(set(wanted).intersection(schema.names))
        for place in places.to_pylist():
            if place["rows"]:
                whole = arrow_streams.read_batch(stream, Batch(**place), schema, names)
                yield from _cut(whole)
    raise ShardUnreadable(f"{shard.path}: holds fewer rows than were planned on")


def _cut(batch: pa.RecordBatch) -> Sequence[pa.RecordBatch]:
    starts = range(0, batch.num_rows, BATCH_ROWS)
    return [batch.slice(start, BATCH_ROWS) for start in starts]


def _opened(stream: pa.NativeFile, names: Collection[str]) -> pq.ParquetFile:
    """A shard, whose dictionary columns are read as what they stand for.

    Arrow would make one dictionary of all values of a row group, and copy it into every batch. That
    a column was a dictionary says only the Arrow schema in the footer, so there it goes unread.
    """
    file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    if not any(_has_dictionary(f.type) for f in file.schema_arrow if f.name in names):
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
