"""Ray Data source: work units of a shard, each as one row of one block, its cells still encoded.

A unit travels as an Arrow stream in a single binary cell: Ray may cut or join blocks at rows, so a
unit can be neither split nor merged, image bytes stay as they are, and a task that is run again
gives the same unit again. INPUT reads of the plan; OUTPUT rows (shard, start, stop, path, payload).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from trio.pipeline.columns import Columns
from trio.pipeline.plan import Read, Unit
from trio.pipeline.storage import locate

BATCH_ROWS = 128
# rows decoded at a time while a row group streams past

BLOCK = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("payload", pa.large_binary()),
    ]
)


class UnitSource(Datasource):
    """One read task for each ``Read`` of the plan."""

    def __init__(self, reads: Sequence[Read], columns: Columns) -> None:
        self._reads = list(reads)
        self._columns = columns

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [_task(read, self._columns) for read in self._reads]


def _task(read: Read, columns: Columns) -> ReadTask:
    meta = BlockMetadata(
        num_rows=len(read.units), size_bytes=None, exec_stats=None, input_files=(read.shard.path,)
    )
    return ReadTask(lambda: blocks(read, columns), meta, schema=BLOCK)


def blocks(read: Read, columns: Columns) -> Iterator[pa.Table]:
    """One block for each unit of a read, in order."""
    for unit, table in tables(read, columns):
        yield pa.Table.from_pydict(
            {
                "shard": [unit.shard],
                "start": [unit.start],
                "stop": [unit.stop],
                "path": [read.shard.path],
                "payload": _cell(encode(table)),
            },
            schema=BLOCK,
        )


def tables(read: Read, columns: Columns) -> Iterator[tuple[Unit, pa.Table]]:
    """Rows of each unit with the projected columns, under the names of their roles."""
    pending = list(read.units)
    parts: list[pa.RecordBatch] = []
    for first, batch in _batches(read, columns):
        while pending and pending[0].start < first + batch.num_rows:
            unit = pending[0]
            begin, end = max(unit.start - first, 0), min(unit.stop - first, batch.num_rows)
            if begin < end:
                parts.append(batch.slice(begin, end - begin))
            if unit.stop > first + batch.num_rows:
                break
            yield unit, pa.Table.from_batches(parts)
            pending.pop(0)
            parts = []
    assert not pending, f"{read.shard.path}: rows from {pending[0].start} on are not there"


def _batches(read: Read, columns: Columns) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row number of its first row, rows), from the row groups that hold wanted rows."""
    location = locate(read.shard.path)
    with location.filesystem.open_input_file(location.path) as stream:
        file = pq.ParquetFile(stream)
        there = file.schema_arrow.names
        roles = {role: name for role, name in columns.roles.items() if name in there}
        names = sorted(set(roles.values()))
        first = 0
        for group, rows in enumerate(read.shard.row_groups):
            wanted = any(u.start < first + rows and u.stop > first for u in read.units)
            offset = first
            group_batches = (
                file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names) if wanted else ()
            )
            for batch in group_batches:
                yield offset, batch.select(list(roles.values())).rename_columns(list(roles))
                offset += batch.num_rows
            assert not wanted or offset == first + rows, f"{read.shard.path} changed under the run"
            first += rows


def _cell(data: pa.Buffer) -> pa.Array:
    """One binary cell around a buffer, without a copy."""
    offsets = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def encode(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow stream; views and slices carry only their own rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode(payload: pa.Buffer) -> pa.Table:
    """The table of ``encode``, without a copy."""
    return pa.ipc.open_stream(payload).read_all()
