"""Columns of the input that go along to the output, partitions of its directories among them.

Hive writes a column's value into the name of a directory (`day=1/part.parquet`); such a column is
in no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.types as pt

from trio.errors import UserError
from trio.job.input.answers import is_bytes, is_list
from trio.job.input.columns import COLUMN, OWN, check_once
from trio.job.storage import bare

ALL = "all"
MISSING = "__HIVE_DEFAULT_PARTITION__"
"""How a null is written."""
PREFIX = "input_"
"""Before the name of a column that the output has itself."""


def partitions(paths: Sequence[str]) -> pa.Schema:
    """Columns in the names of the shards' directories: whole numbers, or else text."""
    found: dict[str, set[str]] = {}
    for folder in {bare(path).rpartition("/")[0] for path in paths}:
        for name, value in _parts(folder):
            found.setdefault(name, set()).add(value)
    return pa.schema({name: _kind(values - {MISSING}) for name, values in found.items()})


def with_fields(
    schemas: Sequence[pa.Schema], paths: Sequence[str], columns: pa.Schema
) -> list[pa.Schema]:
    """The shards' schemas, each with the partition columns that its path has."""
    return [
        _with_fields(schema, path, columns) if len(columns) else schema
        for schema, path in zip(schemas, paths, strict=True)
    ]


def _with_fields(schema: pa.Schema, path: str, columns: pa.Schema) -> pa.Schema:
    there = dict(_parts(bare(path).rpartition("/")[0]))
    new = (f for f in columns if f.name in there and f.name not in schema.names)
    return pa.schema([*schema, *new])


def with_partitions(table: pa.Table, path: str, columns: pa.Schema) -> pa.Table:
    """A shard's rows with the partition columns that it has; one of the file itself goes first."""
    values = dict(_parts(bare(path).rpartition("/")[0]))
    for field in columns:
        name = OWN + field.name
        if name not in table.column_names and values.get(field.name, MISSING) != MISSING:
            value = pa.scalar(values[field.name]).cast(field.type)
            table = table.append_column(name, pa.repeat(value, table.num_rows))
    return table


def _parts(folder: str) -> list[tuple[str, str]]:
    pairs = (part.partition("=") for part in folder.split("/"))
    return [(name, unquote(value)) for name, sign, value in pairs if name and sign]


def _kind(values: Collection[str]) -> pa.DataType:
    """Numbers only where none is written otherwise than it would be again, as 01."""
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in values)
    return pa.int64() if values and whole else pa.string()


def kept_columns(
    wanted: Sequence[str],
    schemas: Sequence[pa.Schema],
    paths: Sequence[str],
    *,
    given: Collection[str],
    ours: Collection[str],
    say: Callable[[str], None],
) -> pa.Schema:
    """What `--keep-columns` asks for, under the names and in the types that the output has.

    Args:
        wanted: names, or `ALL` alone.
        schemas: of the shards, with their partitions.
        paths: of the shards, for messages.
        given: columns that the output holds already, under their own names or as images.
        ours: names of the output's own columns.
        say: takes a line on what has another name there, or is left out.

    Raises:
        UserError: there is no such column, or shards disagree on its type.
    """
    kinds = _unified(schemas, paths)
    if tuple(wanted) == (ALL,):
        pictures = [f.name for f in kinds if f.name not in given and _may_hold_images(f.type)]
        if pictures:
            say(f"--keep-columns all: {', '.join(pictures)} left out (bytes); name what to keep")
        wanted = [name for name in kinds.names if name not in {*given, *pictures}]
    for schema, path in zip(schemas, paths, strict=True):
        check_once(schema, path, wanted)
    fields: list[pa.Field] = []
    for name in wanted:
        if kinds.get_field_index(name) < 0:
            have = ", ".join(kinds.names) or "none"
            raise UserError(f"--keep-columns {name}: the input has no such column; it has {have}")
        called = name
        while called in ours or called in {*wanted} - {name}:
            called = PREFIX + called
        if called != name:
            say(f"--keep-columns: the output has a column {name!r} itself; yours is {called!r}")
        fields.append(pa.field(called, kinds.field(name).type, metadata={COLUMN: name}))
    return pa.schema(fields)


def sources_of(kept: pa.Schema) -> list[str]:
    """Names of kept columns in the input."""
    return [field.metadata[COLUMN].decode() for field in kept]


def _unified(schemas: Sequence[pa.Schema], paths: Sequence[str]) -> pa.Schema:
    """One type for each column of all shards."""
    found: dict[str, pa.Field] = {}
    for schema, path in zip(schemas, paths, strict=True):
        for field in schema:
            mine = pa.field(field.name, plain_type(field.type))
            before = found.setdefault(field.name, mine)
            if not before.equals(mine):
                found[field.name] = _common(before, mine, path)
    return pa.schema(found.values())


def _common(before: pa.Field, mine: pa.Field, path: str) -> pa.Field:
    try:
        schemas = [pa.schema([before]), pa.schema([mine])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: column {mine.name!r} is {mine.type}, elsewhere {before.type}: give all shards"
            " one type, or leave it out of --keep-columns"
        ) from error


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, whose values are read as what they stand for."""
    if pt.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pt.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pt.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pt.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    return kind


def _may_hold_images(kind: pa.DataType) -> bool:
    if is_list(kind):
        return _may_hold_images(kind.value_type)
    if pt.is_struct(kind):
        return any(_may_hold_images(field.type) for field in kind)
    return is_bytes(kind)
