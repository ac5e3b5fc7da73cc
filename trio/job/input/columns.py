"""Which input columns hold what, checked against every shard's schema before anything starts."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.types as pt

from trio.errors import UserError
from trio.job.input.answers import (
    EXPECTED,
    is_bytes,
    is_list,
    is_text,
    readable,
    type_of_values,
)
from trio.vqa.presets.prompt_template import PromptTemplate
from trio.vqa.presets.row_values import column_of

PER_ROW = ("max_new_tokens", "temperature", "seed", "system")
"""Settings that a row may bring, where its column is named."""
ROLES = ("image", "prompt", "id", "answers", *PER_ROW)
ALIASES = {"prompt": ("prompt", "question")}
OWN = "."
"""Before the name of a column that prompts are made of, as its role."""
CARRIED = "="
"""The same of one that goes along."""
COLUMN = b"column"
"""Of the metadata of a column that goes along: its name in the input."""
NONE = ("none", "")
# as in id=none: no column has this role
SHOWN_TYPES = 3
LEAVE_OUT = "leave it out with --columns id=none: ids are then <file>#<row>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What a job reads of its input."""

    roles: Mapping[str, str]
    """Name of each role's column, for the roles that have one; a column may have several roles."""
    id_type: pa.DataType
    """Of the ids in the output."""
    kept: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Columns that go along, as the output has them; see `own_columns`."""
    partitions: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Columns in the names of the shards' directories."""

    def to_bytes(self) -> bytes:
        schemas = pa.schema([("id", self.id_type)], metadata=self.roles), self.kept, self.partitions
        return base64.b64encode(b"".join(schema.serialize() for schema in schemas))

    @classmethod
    def from_bytes(cls, text: bytes) -> Columns:
        stream = pa.BufferReader(base64.b64decode(text))
        schema, kept, partitions = (pa.ipc.read_schema(stream) for _ in range(3))
        roles = {role.decode(): name.decode() for role, name in schema.metadata.items()}
        id_type = schema.field("id").type
        return cls(roles=roles, id_type=id_type, kept=kept, partitions=partitions)

    def carried(self, table: pa.Table) -> pa.Table:
        """Of rows that were read, the columns that go along; null where a shard lacks one."""
        sources = (CARRIED + field.metadata[COLUMN].decode() for field in self.kept)
        there = set(table.column_names)
        columns = [
            table.column(name).cast(field.type)
            if name in there
            else pa.nulls(table.num_rows, field.type)
            for field, name in zip(self.kept, sources, strict=True)
        ]
        return pa.table(columns, schema=self.kept)


def parse_mapping(text: str) -> dict[str, str]:
    """``image=jpg,prompt=caption_prompt`` as a mapping of roles to column names.

    ``id=none`` or ``id=`` stands for no such column; all roles but image may have none.

    Raises:
        UserError: a pair without ``=`` or a role that does not exist.
    """
    out: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        role, sign, name = pair.partition("=")
        role = "prompt" if role == "question" else role
        if not sign or role not in ROLES or (role == "image" and not name):
            raise UserError(
                f"--columns {pair}: write ROLE=COLUMN with one of the roles {', '.join(ROLES)};"
                " all but image may be ROLE=none"
            )
        out[role] = name
    return out


def resolve(
    schemas: Sequence[pa.Schema],
    paths: Sequence[str],
    mapping: Mapping[str, str],
    *,
    prompt_given: bool,
    scored: bool = False,
    joined: bool = False,
    also: Sequence[str] = (),
) -> Columns:
    """Columns of the input, the same for all shards.

    Args:
        schemas: of the shards.
        paths: of the shards, for messages.
        mapping: of roles to column names.
        prompt_given: whether there is a prompt for rows without one.
        scored: whether each shard has to bring answers; theirs are left unread else.
        joined: images lie in other files.
        also: columns that prompts are made of; the caller has looked whether they are there.

    Raises:
        UserError: a column that is missing or of a type that cannot be one, naming the shard.
    """
    if not scored and mapping.get("answers", "") not in NONE:
        raise UserError(
            f"--columns answers={mapping['answers']}: answers are read for scoring only;"
            " ask for it with --score"
        )
    wanted = [role for role in ROLES if (scored or role != "answers")]
    if joined:
        wanted.remove("image")
    named = {role: _find(role, schemas, mapping) for role in wanted}
    roles = {role: name for role, name in named.items() if name is not None}
    needed = {
        "image": not joined,
        "prompt": not prompt_given,
        "id": "id" in roles,
        "answers": scored,
        **{role: role in roles for role in PER_ROW},
    }
    if scored and "prompt" in roles:
        _check_one_prompt(schemas, paths, roles["prompt"])
    for schema, path in zip(schemas, paths, strict=True):
        _check_shard(schema, path, roles, needed)
    id_type = _id_type(roles["id"], schemas, paths) if "id" in roles else pa.string()
    return Columns(roles=roles | {OWN + name: name for name in also}, id_type=id_type)


def of_template(
    template: PromptTemplate, schemas: Sequence[pa.Schema], paths: Sequence[str]
) -> list[str]:
    """Columns that a prompt is made of; UserError: a shard lacks one."""
    names = {column_of(path, schema.names) for schema in schemas for path in template.fields}
    for schema, path in zip(schemas, paths, strict=True):
        if lacking := sorted(names.difference(schema.names)):
            have = ", ".join(schema.names) or "none"
            raise UserError(f"{path}: --prompt-template: no column {lacking[0]!r}; it has {have}")
        check_once(schema, path, names)
    return sorted(names)


def check_once(schema: pa.Schema, path: str, names: Collection[str]) -> None:
    """UserError: several columns have one of the names."""
    for name in names:
        if (count := schema.names.count(name)) > 1:
            raise UserError(f"{path}: {count} columns are called {name!r}")


def _check_one_prompt(schemas: Sequence[pa.Schema], paths: Sequence[str], name: str) -> None:
    for schema, path in zip(schemas, paths, strict=True):
        if name in schema.names and is_list(schema.field(name).type):
            raise UserError(
                f"{path}: column {name!r} holds several prompts, and --score compares with one"
                " answer; use vqa.py with a preset that takes the list apart"
            )


def _find(role: str, schemas: Sequence[pa.Schema], mapping: Mapping[str, str]) -> str | None:
    if role != "image" and mapping.get(role) in NONE:
        return None
    if role in PER_ROW and role not in mapping:
        return None
    names = (mapping[role],) if role in mapping else ALIASES.get(role, (role,))
    for name in names:
        if any(name in schema.names for schema in schemas):
            return name
    if role in mapping:
        raise UserError(
            f"--columns {role}={mapping[role]}: the input has no such column;"
            f" it has {', '.join(schemas[0].names) or 'none'}"
        )
    return None


def _check_shard(
    schema: pa.Schema, path: str, roles: Mapping[str, str], needed: Mapping[str, bool]
) -> None:
    for role in ROLES:
        name = roles.get(role, role)
        count = schema.names.count(name) if role in roles else 0
        if count == 0 and needed[role]:
            have = ", ".join(schema.names) or "none"
            raise UserError(f"{path}: no column {name!r}; it has {have}. {MEND[role]}")
        if role in roles:
            check_once(schema, path, [name])
        fits, expected = FITS[role]
        if count == 1 and not fits(kind := schema.field(name).type):
            raise UserError(f"{path}: column {name!r} is {str(kind)[:200]}; {expected}")


def _is_id(kind: pa.DataType) -> bool:
    """One value that can be compared."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_id(kind.storage_type)
    kind = type_of_values(kind)
    return pt.is_primitive(kind) or pt.is_decimal(kind) or is_text(kind) or is_bytes(kind)


def _holds_prompts(kind: pa.DataType) -> bool:
    return is_text(kind) or (is_list(kind) and is_text(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_null(kind))


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_null(kind))


def _holds_image(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_image(kind.storage_type)
    if pt.is_dictionary(kind) or is_list(kind):
        return _holds_image(kind.value_type)
    if pt.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        known = {name: part for name, part in parts.items() if name in ("bytes", "path")}
        return bool(known) and all(
            is_text(part) or (name == "bytes" and is_bytes(part)) for name, part in known.items()
        )
    return is_bytes(kind) or is_text(kind)


FITS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "image": (
        _holds_image,
        "an image column holds bytes, a struct with bytes or path, a path or URI, or a list of"
        " these",
    ),
    "prompt": (_holds_prompts, "prompts must be strings, or lists of them"),
    "id": (
        _is_id,
        "an id is one value (text, bytes, UUID, number, date or time); name another with"
        f" --columns id=NAME, or {LEAVE_OUT}",
    ),
    "answers": (readable, f"answers are {EXPECTED}"),
    "max_new_tokens": (_is_whole, "max_new_tokens must be whole numbers"),
    "temperature": (_is_number, "temperatures must be numbers"),
    "seed": (_is_whole, "seeds must be whole numbers"),
    "system": (is_text, "system messages must be strings"),
}
"""Whether a column's type may have a role, and what it has to be."""
MEND = {
    "image": "Name the image column with --columns image=NAME",
    "prompt": "Give one prompt for all rows with --prompt, or name the column with --columns"
    " prompt=NAME",
    "id": f"Other shards have it as their id; {LEAVE_OUT}",
    "answers": "Name the column for --score with --columns answers=NAME, or leave --score out",
    **{role: f"Name another column with --columns {role}=NAME, or none" for role in PER_ROW},
}
"""What to do about a column that is missing."""


def _id_type(name: str, schemas: Sequence[pa.Schema], paths: Sequence[str]) -> pa.DataType:
    """One type that holds the ids of all shards."""
    kinds: dict[pa.DataType, str] = {}
    # each with the first shard that has it; a column of nulls says nothing
    for schema, path in zip(schemas, paths, strict=True):
        mine = type_of_values(schema.field(name).type)
        if not pt.is_null(mine):
            kinds.setdefault(mine, path)
    if len(kinds) <= 1:
        return next(iter(kinds), pa.string())
    if all(map(is_text, kinds)):
        return pa.string()
    if all(map(is_bytes, kinds)):
        return pa.binary()
    if all(map(pt.is_integer, kinds)) and pa.uint64() not in kinds:
        return pa.int64()
    if all(map(pt.is_unsigned_integer, kinds)):
        return pa.uint64()
    listed = ", ".join(f"{kind} in {path}" for kind, path in list(kinds.items())[:SHOWN_TYPES])
    raise UserError(f"column {name!r} is {listed}: give all shards one type, or {LEAVE_OUT}")
