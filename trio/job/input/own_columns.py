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
from trio.job.input.answers import is_bytes, is_list, is_text
from trio.job.input.columns import CARRIED, COLUMN, OWN, Columns, check_once
from trio.job.storage import bare

ALL = "all"
MISSING = "__HIVE_DEFAULT_PARTITION__"
"""How a null is written."""
RENAMED = "input_"
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


def with_partitions(table: pa.Table, path: str, columns: Columns) -> pa.Table:
    """A shard's rows with the partition columns that it has; one of the file itself goes first."""
    values = dict(_parts(bare(path).rpartition("/")[0]))
    for field in columns.partitions:
        if values.get(field.name, MISSING) == MISSING:
            continue
        value = pa.scalar(values[field.name]).cast(field.type)
        for role in (OWN + field.name, CARRIED + field.name):
            if role in columns.roles and role not in table.column_names:
                table = table.append_column(role, pa.repeat(value, table.num_rows))
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
        given: columns that the output holds already under their own names.
        ours: names of the output's own columns.
        say: takes a line on what has another name there, or is left out.

    Raises:
        UserError: there is no such column, or shards disagree on its type.
    """
    there = dict.fromkeys(name for schema in schemas for name in schema.names)
    is_all = tuple(wanted) == (ALL,)
    kinds = _unified(schemas, paths, there.keys() - {*given} if is_all else wanted)
    if is_all:
        pictures = [field.name for field in kinds if _may_hold_images(field.type)]
        if pictures:
            say(f"--keep-columns all: {', '.join(pictures)} left out (bytes); name what to keep")
        wanted = [name for name in kinds.names if name not in pictures]
    for schema, path in zip(schemas, paths, strict=True):
        check_once(schema, path, wanted)
    fields: list[pa.Field] = []
    for name in wanted:
        if kinds.get_field_index(name) < 0:
            have = ", ".join(there) or "none"
            raise UserError(f"--keep-columns {name}: the input has no such column; it has {have}")
        called = name
        while called in ours or called in {*wanted} - {name}:
            called = RENAMED + called
        if called != name:
            say(f"--keep-columns: the output has a column {name!r} itself; yours is {called!r}")
        fields.append(pa.field(called, kinds.field(name).type, metadata={COLUMN: name}))
    return pa.schema(fields)


def sources_of(kept: pa.Schema) -> list[str]:
    """Names of kept columns in the input."""
    return [field.metadata[COLUMN].decode() for field in kept]


def _unified(
    schemas: Sequence[pa.Schema], paths: Sequence[str], wanted: Collection[str]
) -> pa.Schema:
    """One type for each of the wanted columns of all shards."""
    found: dict[str, pa.Field] = {}
    for schema, path in zip(schemas, paths, strict=True):
        for field in (field for field in schema if field.name in wanted):
            mine = pa.field(field.name, plain_type(field.type))
            before = found.setdefault(field.name, mine)
            if not before.equals(mine):
                found[field.name] = _common(before, mine, path)
    return pa.schema(found.values())


def _common(before: pa.Field, mine: pa.Field, path: str) -> pa.Field:
    """One that holds the values of both, none of them changed."""
    schemas = [pa.schema([before]), pa.schema([mine])]
    try:
        both = pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except pa.ArrowException:
        both = None
    if both is None or not all(_holds(both.type, one.type) for one in (before, mine)):
        raise UserError(
            f"{path}: column {mine.name!r} is {mine.type}, elsewhere {before.type}: give all shards"
            " one type, or leave it out of --keep-columns"
        )
    return both


def _holds(whole: pa.DataType, part: pa.DataType) -> bool:
    """Whether each value of one type is one of the other."""
    if whole == part or pt.is_null(part):
        return True
    if pt.is_integer(whole) and pt.is_integer(part):
        room = whole.bit_width - int(pt.is_signed_integer(whole))
        signs = pt.is_signed_integer(whole) or not pt.is_signed_integer(part)
        return signs and part.bit_width - int(pt.is_signed_integer(part)) <= room
    if pt.is_struct(whole) and pt.is_struct(part):
        return all(_holds(whole.field(field.name).type, field.type) for field in part)
    if is_list(whole) and is_list(part):
        return _holds(whole.value_type, part.value_type)
    kinds = pt.is_floating, is_text, is_bytes
    return any(is_kind(whole) and is_kind(part) for is_kind in kinds)


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
    if pt.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pt.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    return kind


def _may_hold_images(kind: pa.DataType) -> bool:
    if is_list(kind):
        return _may_hold_images(kind.value_type)
    if pt.is_struct(kind):
        return any(_may_hold_images(field.type) for field in kind)
    return is_bytes(kind)
