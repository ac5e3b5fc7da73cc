"""Arrow streams, as `datasets` saves them: where their record batches lie, and single ones of them.

The format is a row of messages: eight bytes of head, metadata that say how many rows and bytes
follow, and these. To index a stream its heads and metadata are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from trio.job.input.kinds.read_ahead import ReadAhead
from trio.job.storage import Location

HEAD = 8
MARK = 0xFFFFFFFF
_DICTIONARY, _RECORDS = 2, 3
# what a message holds


@dataclass(frozen=True, slots=True)
class Batch:
    """A record batch in a stream."""

    offset: int
    length: int
    # bytes of the message, head included
    rows: int


def opened(location: Location) -> pa.NativeFile:
    """Local files are mapped: of a batch only the columns that are wanted are read then."""
    if location.local:
        return pa.memory_map(location.path)
    return location.filesystem.open_input_file(location.path)


def schema_of(stream: pa.NativeFile) -> pa.Schema:
    stream.seek(0)
    return pa.ipc.open_stream(stream).schema.remove_metadata()


def batches_of(file: ReadAhead) -> Iterator[Batch]:
    """All record batches of a stream.

    Raises:
        ValueError: it is no stream, is cut, or has dictionaries, which batches share.
    """
    try:
        yield from _batches_of(file)
    except struct.error as error:
        raise ValueError(f"damaged metadata: {error}") from error


def _batches_of(file: ReadAhead) -> Iterator[Batch]:
    place = 0
    while place < file.size:
        mark, length = struct.unpack("<II", _exactly(file, place, HEAD))
        if mark != MARK:
            raise ValueError(f"no Arrow stream: no message at byte {place}")
        if length == 0:
            return
        metadata = _exactly(file, place + HEAD, length)
        message = _Table(metadata, _offset(metadata, 0))
        body = message.number(3, "<q")
        whole = HEAD + length + body
        if body < 0:
            raise ValueError(f"damaged metadata at byte {place}")
        if place + whole > file.size:
            raise ValueError(f"it ends within the record batch at byte {place}")
        kind = message.number(1, "<B")
        if kind == _DICTIONARY:
            raise ValueError("columns of a dictionary type; save them as plain values")
        if kind == _RECORDS:
            yield Batch(place, whole, message.table(2).number(0, "<q"))
        place += whole


def read_batch(
    stream: pa.NativeFile, batch: Batch, schema: pa.Schema, names: Sequence[str]
) -> pa.RecordBatch:
    """Columns of one batch."""
    stream.seek(batch.offset)
    message = pa.ipc.read_message(stream.read_buffer(batch.length))
    return pa.ipc.read_record_batch(message, schema).select(list(names))


def _exactly(file: ReadAhead, offset: int, size: int) -> bytes:
    data = file.read_at(offset, size)
    if len(data) < size:
        raise ValueError(f"it ends at byte {offset + len(data)}, within a message")
    return data


class _Table:
    """A table of a flatbuffer, in which Arrow writes its metadata."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place
        (back,) = struct.unpack_from("<i", data, place)
        self._fields = place - back
        (self._end,) = struct.unpack_from("<H", data, self._fields)

    def _field(self, number: int) -> int | None:
        entry = 4 + 2 * number
        if entry >= self._end:
            return None
        (offset,) = struct.unpack_from("<H", self._data, self._fields + entry)
        return self._place + offset if offset else None

    def number(self, field: int, form: str) -> int:
        """0, the default, where it is left out."""
        place = self._field(field)
        return 0 if place is None else int(struct.unpack_from(form, self._data, place)[0])

    def table(self, field: int) -> _Table:
        place = self._field(field)
        if place is None:
            raise ValueError("a message without its content")
        return _Table(self._data, _offset(self._data, place))


def _offset(data: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", data, place)[0])
