"""Rows of tars and folders as they are found, and as the columns of an index.

A raw row has `id`, `image`, the text of a `txt`, that of a `json`, and where it is known before it
is read, its `error`. Which columns the fields of `json` become is known when all shards are
through, so raw rows are written first and read again.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.job.input.kinds import json_fields
from trio.job.input.kinds.json_fields import Seen

MOST_TEXT = 16 << 20
# bytes of a txt or json
ERROR_COLUMN = "error"
ERROR = pa.struct([("kind", pa.string()), ("message", pa.string())])
GROUP_BYTES, MOST_GROUP_ROWS, LEAST_GROUP_ROWS = 64 << 20, 4096, 16
# of a row group of an index: readers share a shard by these
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# no file that is read says this


@dataclass(slots=True)
class Notes:
    """What was odd about rows, counted, each with an example."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, what: str, example: str) -> None:
        with self._lock:
            self.counts[what] += 1
            self.examples.setdefault(what, example)

    def merge(self, other: Notes) -> None:
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    def lines(self) -> Iterator[str]:
        for what, count in self.counts.items():
            yield f"{what}: {count}, first {self.examples[what]}"


def text_of(data: bytes | None, name: str, notes: Notes) -> str | None:
    """Of a txt or json; None and a note where it is none."""
    if data is None:
        notes.add(f"texts of more than {MOST_TEXT} bytes, which are null", name)
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.add("texts that are not UTF-8, which are null", name)
        return None


def write_raw(
    rows: Iterable[Mapping[str, Any]], image: pa.DataType, path: Path, notes: Notes
) -> Seen:
    """Write a shard's raw rows; returns what is in their JSON.

    Args:
        rows: in their order.
        image: type of the column.
        path: of the file.
        notes: gets what is odd.
    """
    seen: Seen = {}
    names = [("id", pa.string()), ("image", image), ("txt", pa.string()), ("json", pa.string())]
    schema = pa.schema([*names, (ERROR_COLUMN, ERROR)])
    coming = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(islice(coming, MOST_GROUP_ROWS)):
            for row in some:
                if (text := row.get("json")) is not None:
                    _look(text, row["id"], seen, notes)
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
    return seen


def _look(text: str, id: str, seen: Seen, notes: Notes) -> None:
    fields = json_fields.parsed(text)
    if fields is None:
        notes.add("JSON texts that are no object, whose columns are null", id)
    else:
        json_fields.look(fields, seen)


def check_room(error: Exception) -> None:
    """Raise an error again that comes of writing the index, not of what is read for it."""
    if getattr(error, "errno", None) in FULL:
        raise error


def group_rows(size: int, rows: int) -> int:
    """Rows of a row group, of some bytes of pictures."""
    return max(LEAST_GROUP_ROWS, min(MOST_GROUP_ROWS, GROUP_BYTES * rows // max(size, 1)))


def write_index(
    raw: Path, path: Path, size: int, kinds: Mapping[str, pa.DataType] | None, *, with_text: bool
) -> None:
    """The index of raw rows: `id`, `image`, `txt`, a column for each field, `error`.

    Args:
        raw: their file.
        path: of the index.
        size: bytes of the shard, by which row groups are cut.
        kinds: types of the fields; None: `json` stays text.
        with_text: whether any shard has a `txt`.
    """
    file = pq.ParquetFile(raw)
    columns = {name: file.schema_arrow.field(name).type for name in ("id", "image")}
    columns |= {"txt": pa.string()} if with_text else {}
    columns |= {"json": pa.string()} if kinds is None else {}
    columns |= {json_fields.PREFIX + name: kind for name, kind in (kinds or {}).items()}
    schema = pa.schema({**columns, ERROR_COLUMN: ERROR})
    length = group_rows(size, file.metadata.num_rows)
    with pq.ParquetWriter(path, schema) as writer:
        for number in range(file.metadata.num_row_groups):
            table = _with_fields(file.read_row_group(number), kinds or {})
            writer.write_table(table.select(schema.names), row_group_size=length)


def _with_fields(table: pa.Table, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    objects = [text and json_fields.parsed(text) for text in table.column("json").to_pylist()]
    for name, kind in kinds.items():
        values = json_fields.column(name, kind, objects)
        table = table.append_column(json_fields.PREFIX + name, values)
    return table
