"""JSONL and CSV files as Parquet: their own columns, and an `id` where they have none.

JSONL: types as Arrow infers them, one for the whole file. CSV: whole numbers, fractions, or text
where a number would lose letters (`007`); an empty cell is null.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.raw_rows import MOST_GROUP_ROWS
from trio.job.storage import Location

BLOCK_BYTES = 4 << 20
# parsed at a time
MOST_LINE = 256 << 20
ID = "id"
INTEGER, FRACTION = r"^(0|-?[1-9]\d{0,17})$", r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"


def write_table(found: Found, name: str, path: Path) -> int:
    """Write the file's rows as Parquet; returns how many bytes were read.

    Args:
        found: the file.
        name: what ids call it.
        path: of the Parquet file.

    Raises:
        UserError: it cannot be read as what it is called.
    """
    csv = _is_csv(found.location.path)
    try:
        schema = _csv_schema(found.location) if csv else _json_schema(found.location)
        parts = _csv_parts(found.location) if csv else _json_parts(found.location, schema)
        _write(parts, schema, name, path)
    except (OSError, ValueError, pa.ArrowException) as error:
        kind = "CSV" if csv else "JSONL"
        reason = first_line(error)
        raise UserError(f"{found.location.uri}: not readable as {kind} ({reason})") from error
    return 2 * found.size


def _is_csv(path: str) -> bool:
    return any(part in ("csv", "tsv") for part in path.lower().split(".")[-2:])


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


def _json_schema(location: Location) -> pa.Schema:
    schema = pa.schema([])
    for part in _json_parts(location, None):
        fields = [pa.field(field.name, _untimed(field.type)) for field in part.schema]
        schema = pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")
    return schema


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


def _csv_schema(location: Location) -> pa.Schema:
    """Of the columns, by all their values."""
    open_to: dict[str, set[str]] = {}
    for part in _csv_parts(location):
        for name in part.column_names:
            fits = open_to.setdefault(name, {INTEGER, FRACTION})
            fits -= {pattern for pattern in fits if not _all_match(part.column(name), pattern)}
    kinds = {INTEGER: pa.int64(), FRACTION: pa.float64()}
    # A column of nulls alone is text.
    return pa.schema(
        [
            (name, next((kinds[p] for p in (INTEGER, FRACTION) if p in fits), pa.string()))
            for name, fits in open_to.items()
        ]
    )


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False


def _csv_parts(location: Location) -> Iterator[pa.Table]:
    """Some rows at a time, all columns text."""
    delimiter = "\t" if ".tsv" in location.path.lower()[-8:] else ","
    parse = pcsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pcsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
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
