"""The index of shards that are no Parquet: a Parquet file for each, made once in planning.

INPUT shards as they are listed; OUTPUT their indexes in a directory, and what is known from them.
Units, ids, columns and prompts work on the index as they do on Parquet. What it holds:

    tar             id, image (where its bytes lie in the tar), txt, json.NAME, error
    images          id, image (its path from the folder), txt, json.NAME, error
    JSONL, CSV      the file's own columns, and an id
    Arrow stream    a row for each record batch: where it lies, and how many rows it has
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.input.kinds import arrow_streams, json_fields
from trio.job.input.kinds.found_shard import Found, row_names
from trio.job.input.kinds.image_folders import bytes_beside, image_rows
from trio.job.input.kinds.json_fields import Seen
from trio.job.input.kinds.raw_rows import ERROR_COLUMN, Notes, check_room, write_index, write_raw
from trio.job.input.kinds.read_ahead import ReadAhead
from trio.job.input.kinds.shard_kinds import ARROW, IMAGES, PARQUET, TABLE, TAR
from trio.job.input.kinds.tar_members import NoTar
from trio.job.input.kinds.tar_samples import PICTURES, PLACES, samples
from trio.job.input.kinds.text_tables import write_table
from trio.tables import counted

THREADS = 16
BATCHES = pa.schema([("offset", pa.int64()), ("length", pa.int64()), ("rows", pa.int64())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What is known of an indexed shard."""

    path: Path
    rows: int
    row_groups: tuple[int, ...]
    schema: pa.Schema
    """Of the rows as the reader gives them."""


@dataclass(slots=True)
class _First:
    """What the first look at a shard leaves."""

    schema: pa.Schema | None = None
    # of an Arrow stream
    rows: int = 0
    seen: Seen = field(default_factory=dict)
    has_text: bool = False
    bytes_read: int = 0
    notes: Notes = field(default_factory=Notes)


def name_of(number: int) -> str:
    """An index's file."""
    return f"{number:06d}.parquet"


def build(
    found: Sequence[Found], directory: Path, say: Callable[[str], None], limit: int | None = None
) -> dict[int, Index]:
    """Index all shards that are no Parquet, by their numbers.

    Args:
        found: all shards.
        directory: an empty one, for the indexes.
        say: told what they took, and what is odd about their rows.
        limit: rows of the run: shards behind those that hold so many are left out.

    Raises:
        UserError: a shard that cannot be read.
        OSError: an index cannot be written.
    """
    numbers = [number for number, one in enumerate(found) if one.kind != PARQUET]
    names, began = row_names(found), time.monotonic()
    pool = ThreadPoolExecutor(THREADS)
    try:
        look = partial(_first_look, found, names, directory)
        firsts: dict[int, _First] = {}
        for wave in _waves(numbers, limit):
            if limit is not None and sum(first.rows for first in firsts.values()) >= limit:
                say(f"index: the first {len(firsts)} shards hold --limit {limit} rows")
                break
            firsts |= dict(zip(wave, pool.map(look, wave), strict=True))
        seen = json_fields.merged(first.seen for first in firsts.values())
        kinds, texts = json_fields.types(seen), any(first.has_text for first in firsts.values())
        finish = partial(_finished, found, directory, firsts, kinds, texts)
        made = dict(zip(firsts, pool.map(finish, firsts), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    for line in _report(found, firsts, seen, time.monotonic() - began):
        say(line)
    return made


def _waves(numbers: Sequence[int], limit: int | None) -> Iterator[Sequence[int]]:
    """All at once; where there is a limit few first, as these may do."""
    place, length = 0, len(numbers) if limit is None else 1
    while place < len(numbers):
        yield numbers[place : place + length]
        place, length = place + length, min(2 * length, THREADS)


def _raw(directory: Path, number: int) -> Path:
    return directory / f"raw-{number:06d}.parquet"


def _first_look(
    found: Sequence[Found], names: Sequence[str], directory: Path, number: int
) -> _First:
    one, name = found[number], names[number]
    first = _First()
    path = directory / name_of(number)
    if one.kind == TABLE:
        first.bytes_read = write_table(one, name, path, first.notes)
    elif one.kind == ARROW:
        _write_batches(one, path, first)
        return first
    else:
        path = _raw(directory, number)
        _write_raw(one, name, path, first)
    first.rows = pq.read_metadata(path).num_rows
    return first


def _write_raw(one: Found, name: str, path: Path, first: _First) -> None:
    if one.kind == IMAGES:
        first.seen = write_raw(image_rows(one, first.notes), pa.string(), path, first.notes)
        first.bytes_read = bytes_beside(one)
    else:
        first.seen, first.bytes_read = _tar(one, name, path, first.notes)
    texts = pq.read_table(path, columns=["txt"]).column("txt")
    first.has_text = texts.null_count < len(texts)


def _tar(one: Found, name: str, path: Path, notes: Notes) -> tuple[Seen, int]:
    try:
        with one.location.filesystem.open_input_file(one.location.path) as stream:
            file = ReadAhead(stream, one.size, far=not one.location.local)
            seen = write_raw(samples(file, name, notes), PLACES, path, notes)
            return seen, file.bytes_read
    except (OSError, NoTar, pa.ArrowException) as error:
        check_room(error)
        reason = first_line(error)
        raise UserError(f"{one.location.uri}: not a readable tar ({reason})") from error


def _write_batches(one: Found, path: Path, first: _First) -> None:
    try:
        with arrow_streams.opened(one.location) as stream:
            file = ReadAhead(stream, one.size, far=not one.location.local)
            batches = list(arrow_streams.batches_of(file))
            first.schema = arrow_streams.schema_of(stream)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{one.location.uri}: not a readable Arrow stream ({reason})") from error
    rows = [{"offset": b.offset, "length": b.length, "rows": b.rows} for b in batches]
    pq.write_table(pa.Table.from_pylist(rows, schema=BATCHES), path)
    first.rows, first.bytes_read = sum(b.rows for b in batches), file.bytes_read


def _finished(
    found: Sequence[Found],
    directory: Path,
    firsts: Mapping[int, _First],
    kinds: Mapping[str, pa.DataType] | None,
    with_text: bool,
    number: int,
) -> Index:
    one, path = found[number], directory / name_of(number)
    if one.kind == ARROW:
        lengths = tuple(pq.read_table(path).column("rows").to_pylist())
        schema = firsts[number].schema
        return Index(path=path, rows=sum(lengths), row_groups=lengths, schema=schema)
    if one.kind != TABLE:
        raw = _raw(directory, number)
        write_index(raw, path, one.size, kinds, with_text=with_text)
        raw.unlink()
    file = pq.ParquetFile(path)
    meta = file.metadata
    lengths = tuple(meta.row_group(n).num_rows for n in range(meta.num_row_groups))
    schema = _as_read(file.schema_arrow.remove_metadata(), one.kind)
    return Index(path=path, rows=meta.num_rows, row_groups=lengths, schema=schema)


def _as_read(schema: pa.Schema, kind: str) -> pa.Schema:
    """Of rows with their pictures, and without the errors that are known."""
    if kind == TABLE:
        return schema
    if kind == TAR:
        schema = schema.set(schema.get_field_index("image"), pa.field("image", PICTURES))
    return schema.remove(schema.get_field_index(ERROR_COLUMN))


def _report(
    found: Sequence[Found], firsts: Mapping[int, _First], seen: Seen, took_s: float
) -> Iterator[str]:
    if not firsts:
        return
    kinds = Counter(found[number].kind for number in firsts)
    size = sum(found[number].size for number in firsts)
    read = sum(first.bytes_read for first in firsts.values())
    shards = ", ".join(counted(count, f"{kind} shard") for kind, count in kinds.items())
    yield (
        f"index: {shards}, {size / 1e9:.3g} GB, {1e3 * read / max(size, 1):.3g} MB read per GB,"
        f" {took_s:.1f} s"
    )
    if len(seen) > json_fields.MOST_FIELDS:
        most = json_fields.MOST_FIELDS
        yield f"index: JSON of more than {most} different fields, which stays text in a column json"
    elif names := json_fields.disagreeing(seen):
        yield f"index: values of several types, taken as text: {', '.join(names)}"
    notes = Notes()
    for first in firsts.values():
        notes.merge(first.notes)
    for line in notes.lines():
        yield f"index: {line}"
