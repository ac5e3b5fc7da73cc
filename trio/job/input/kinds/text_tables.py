"""JSONL and CSV files as Parquet: their own columns, and an `id` where they have none.

JSONL: types as Arrow infers them, one for the whole file. CSV: whole numbers, fractions, or text
where a number would not be written as it is there (`007`, `1.10`); an empty cell is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.raw_rows import MOST_GROUP_ROWS, Notes, check_room
from trio.job.storage import Location

BLOCK_BYTES = 4 << 20
# parsed at a time
MOST_LINE = 256 << 20
ID = "id"
STRADDLING = "straddling"
# what Arrow says of a row that is larger than a block
_FORM = re.compile(r"\.(csv|tsv)(\.(gz|bz2|zst))?$", re.IGNORECASE)
_LONG = re.compile(rb"[:,\[\s]-?\d{16,}\s*[,}\]]")
# may be a whole number that a fraction does not hold
Number = tuple[pa.DataType, Callable[[Any], str]]
NUMBERS: tuple[Number, ...] = (
    (pa.int64(), str),
    (pa.float64(), repr),
    (pa.float64(), lambda value: repr(value).removesuffix(".0")),
)
"""Types of numbers, each with the one way in which all values of a column are written."""


def write_table(found: Found, name: str, path: Path, notes: Notes) -> int:
    """Write the file's rows as Parquet; returns how many bytes were read.

    Args:
        found: the file.
        name: what ids call it.
        path: of the Parquet file.
        notes: gets what is left out.

    Raises:
        UserError: it cannot be read as what it is called.
        OSError: no room for the Parquet file.
    """
    csv = is_csv(found.location.path)
    try:
        if csv:
            _write_csv(found.location, name, path)
        else:
            schema = _json_schema(found.location, notes)
            _write(_json_parts(found.location, schema), schema, name, path)
    except (OSError, ValueError, pa.ArrowException) as error:
        check_room(error)
        kind = "CSV" if csv else "JSONL"
        reason = first_line(error)
        raise UserError(f"{found.location.uri}: not readable as {kind} ({reason})") from error
    return 2 * found.size


def is_csv(path: str) -> bool:
    return _FORM.search(path) is not None


def _write_csv(location: Location, name: str, path: Path) -> None:
    try:
        _write(_csv_parts(location, BLOCK_BYTES), _csv_schema(location, BLOCK_BYTES), name, path)
    except pa.ArrowInvalid as error:
        if STRADDLING not in str(error):
            raise
        _write(_csv_parts(location, MOST_LINE), _csv_schema(location, MOST_LINE), name, path)


def _write(parts: Iterator[pa.Table], schema: pa.Schema, name: str, path: Path) -> None:
    made_up = ID not in schema.names
    whole = schema.append(pa.field(ID, pa.string())) if made_up else schema
    row = 0
    with pq.ParquetWriter(path, whole) as writer:
        for part in parts:
            table = part.cast(schema)
            if made_up:
                ids = pa.array([f"{name}#{row + n}" for n in range(part.num_rows)], pa.string())
                table = table.append_column(ID, ids)
            row += part.num_rows
            writer.write_table(table, row_group_size=MOST_GROUP_ROWS)


def _json_schema(location: Location, notes: Notes) -> pa.Schema:
    schema = pa.schema([])
    for part in _json_parts(location, None):
        fields = [pa.field(field.name, _untimed(field.type)) for field in part.schema]
        schema = pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")
    return pa.schema(_filled(schema, location.uri, notes))


def _filled(fields: Iterable[pa.Field], place: str, notes: Notes) -> list[pa.Field]:
    """Without those of empty objects, which Parquet cannot hold."""
    out = []
    for field in fields:
        kind, lists = field.type, 0
        while pa.types.is_list(kind):
            kind, lists = kind.value_type, lists + 1
        if pa.types.is_struct(kind):
            kind = pa.struct(_filled(kind, f"{place}: {field.name}", notes))
            if not kind.num_fields:
                notes.add("fields of empty objects alone, left out", f"{place}: {field.name}")
                continue
        for _ in range(lists):
            kind = pa.list_(kind)
        out.append(pa.field(field.name, kind))
    return out


def _check_whole(text: bytes, schema: pa.Schema) -> None:
    """ValueError: a whole number that the type of its column does not hold."""
    fractions = {field.name: field.type for field in schema if "double" in str(field.type)}
    for line in filter(_LONG.search, text.splitlines() if fractions else ()):
        row = json.loads(line)
        for name in fractions.keys() & row.keys():
            if lost := _lost(row[name], fractions[name]):
                raise ValueError(f"{name}: write the number as text, digits are lost: {lost}")


def _lost(value: Any, kind: pa.DataType) -> int | None:
    """A whole number that is another in its type."""
    if type(value) is int:
        return value if float(str(value)) != value and pa.types.is_floating(kind) else None
    if isinstance(value, list):
        return next(filter(None, (_lost(one, kind.value_type) for one in value)), None)
    if isinstance(value, dict):
        there = ((one, kind.get_field_index(name)) for name, one in value.items())
        lost = (_lost(one, kind.field(place).type) for one, place in there if place >= 0)
        return next(filter(None, lost), None)
    return None


def _untimed(kind: pa.DataType) -> pa.DataType:
    """The type without times, for which Arrow takes text that looks like one."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_untimed(kind.value_type))
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pa.struct([(field.name, _untimed(field.type)) for field in fields])
    return kind


def _json_parts(location: Location, schema: pa.Schema | None) -> Iterator[pa.Table]:
    """Some rows at a time; types as they look where there is no schema."""
    read = pjson.ReadOptions(block_size=MOST_LINE, use_threads=False)
    parse = pjson.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer"
    )
    for text in _lines(location):
        if schema:
            _check_whole(text, schema)
        yield pjson.read_json(pa.BufferReader(text), read, parse)


def _lines(location: Location) -> Iterator[bytes]:
    """Whole lines, some MB at a time."""
    rest = b""
    with location.filesystem.open_input_stream(location.path) as stream:
        while block := stream.read(BLOCK_BYTES):
            whole, newline, end = block.rpartition(b"\n")
            if newline:
                yield from filter(bytes.strip, [rest + whole + newline])
                rest = end
            else:
                rest += block
            if len(rest) > MOST_LINE:
                raise ValueError(f"a line of more than {MOST_LINE} bytes")
    if rest.strip():
        yield rest


def _csv_schema(location: Location, block: int) -> pa.Schema:
    """Of the columns, by all their values; one of nulls alone is text."""
    open_to: dict[str, list[Number]] = {}
    for part in _csv_parts(location, block):
        for name in part.column_names:
            fits = open_to.get(name, NUMBERS)
            open_to[name] = [one for one in fits if _holds(part.column(name).drop_null(), *one)]
    numbers = {n: fits[0][0] for n, fits in open_to.items() if 0 < len(fits) < len(NUMBERS)}
    return pa.schema([(name, numbers.get(name, pa.string())) for name in open_to])


def _holds(column: pa.ChunkedArray, kind: pa.DataType, written: Callable[[Any], str]) -> bool:
    """Whether all values are written as numbers of a type are."""
    try:
        values = column.cast(kind)
    except pa.ArrowInvalid:
        return False
    pairs = zip(values.to_pylist(), column.to_pylist(), strict=True)
    return all(isfinite(value) and written(value) == text for value, text in pairs)


def _csv_parts(location: Location, block: int) -> Iterator[pa.Table]:
    """Some rows at a time, all columns text."""
    form = _FORM.search(location.path)
    delimiter = "\t" if form is not None and form[1].lower() == "tsv" else ","
    parse = pcsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pcsv.ReadOptions(block_size=block, use_threads=False)
    with location.filesystem.open_input_stream(location.path) as stream:
        names = pcsv.open_csv(stream, read, parse).schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    convert = pcsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
    )
    with location.filesystem.open_input_stream(location.path) as stream:
        reader = pcsv.open_csv(stream, read, parse, convert)
        for batch in reader:
            yield pa.Table.from_batches([batch])
