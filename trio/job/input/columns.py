"""Which input columns hold what, checked against every shard's schema before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from trio.errors import UserError
from trio.job.input.answers import EXPECTED, is_bytes, is_text, readable

ROLES = ("image", "prompt", "id", "answers")
ALIASES = {"prompt": ("prompt", "question")}
NONE = "none"
# as in id=none: no column has this role
LEAVE_OUT = "leave it out with --columns id=none: ids are then <file>#<row>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names in the input of the columns that a job reads; None where the input has none."""

    image: str
    prompt: str | None
    id: str | None
    answers: str | None
    id_type: pa.DataType

    @property
    def roles(self) -> dict[str, str]:
        """Name in the input of each role's column; one column may have several roles."""
        pairs = zip(ROLES, (self.image, self.prompt, self.id, self.answers), strict=True)
        return {role: name for role, name in pairs if name is not None}


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
                f" all but image may be ROLE={NONE}"
            )
        out[role] = name
    return out


def resolve(
    schemas: Sequence[pa.Schema],
    paths: Sequence[str],
    mapping: Mapping[str, str],
    *,
    prompt_given: bool,
    scored: bool | None = None,
) -> Columns:
    """Columns of the input, the same for all shards.

    Args:
        schemas: of the shards.
        paths: of the shards, for messages.
        mapping: of roles to column names.
        prompt_given: whether there is a prompt for rows without one.
        scored: whether each shard has to bring answers (True), or theirs are left unread (False);
            None: those that have some are read.

    Raises:
        UserError: a column that is missing or of a type that cannot be one, naming the shard.
    """
    if scored is False and mapping.get("answers", NONE) not in ("", NONE):
        raise UserError(
            f"--columns answers={mapping['answers']}: answers are read for scoring only;"
            " ask for it with --score"
        )
    found: dict[str, str | None] = {}
    for role in ROLES:
        unread = role == "answers" and scored is False
        found[role] = None if unread else _find(role, schemas, mapping)
    for schema, path in zip(schemas, paths, strict=True):
        _check_shard(schema, path, found, prompt_given)
        _check_answers(schema, path, found["answers"], needed=bool(scored))
    id_type = _id_type(found["id"], schemas, paths)
    image = found["image"]
    assert image is not None
    return Columns(
        image=image,
        prompt=found["prompt"],
        id=found["id"],
        answers=found["answers"],
        id_type=id_type,
    )


def _find(role: str, schemas: Sequence[pa.Schema], mapping: Mapping[str, str]) -> str | None:
    if role != "image" and mapping.get(role) in ("", NONE):
        _check_none(role, mapping[role], schemas)
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


def _check_none(role: str, name: str, schemas: Sequence[pa.Schema]) -> None:
    if any(name in schema.names for schema in schemas if name):
        raise UserError(
            f"--columns {role}={name}: the input has a column {name!r}; write {role}= (nothing"
            " behind it) for no column, or rename that one"
        )


def _check_shard(
    schema: pa.Schema, path: str, found: Mapping[str, str | None], prompt_given: bool
) -> None:
    have = ", ".join(schema.names) or "none"
    image, prompt = found["image"], found["prompt"]
    if image is None or image not in schema.names:
        raise UserError(
            f"{path}: no column {image or 'image'!r}; it has {have}."
            " Name the image column with --columns image=NAME"
        )
    _only_once(schema, path, [name for name in found.values() if name is not None])
    if not _holds_image(schema.field(image).type):
        raise UserError(
            f"{path}: column {image!r} is {schema.field(image).type}; an image column holds bytes,"
            " a struct with bytes or path, a path or URI, or a list of these"
        )
    if prompt is None or prompt not in schema.names:
        if not prompt_given:
            raise UserError(
                f"{path}: no column 'prompt' or 'question'; it has {have}. Give one prompt for all"
                " rows with --prompt, or name the column with --columns prompt=NAME"
            )
    elif not is_text(schema.field(prompt).type):
        kind = schema.field(prompt).type
        raise UserError(f"{path}: column {prompt!r} is {kind}; prompts must be strings")


def _check_answers(schema: pa.Schema, path: str, name: str | None, *, needed: bool) -> None:
    if name is None or name not in schema.names:
        if needed:
            have = ", ".join(schema.names) or "none"
            raise UserError(
                f"{path}: no column {name or 'answers'!r} for --score; it has {have}."
                " Name the column with --columns answers=NAME, or leave --score out"
            )
    elif not readable(kind := schema.field(name).type):
        raise UserError(f"{path}: column {name!r} is {str(kind)[:200]}; answers are {EXPECTED}")


def _only_once(schema: pa.Schema, path: str, names: Sequence[str]) -> None:
    for name in names:
        if schema.names.count(name) > 1:
            raise UserError(f"{path}: {schema.names.count(name)} columns are called {name!r}")


def _is_blob(kind: pa.DataType) -> bool:
    return is_bytes(kind.value_type if pt.is_dictionary(kind) else kind)


def _is_id(kind: pa.DataType) -> bool:
    """One value that Parquet can hold and that can be compared."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_id(kind.storage_type)
    simple = pt.is_boolean, pt.is_integer, pt.is_floating, pt.is_decimal, is_text, is_bytes
    moment = pt.is_date, pt.is_time, pt.is_timestamp, pt.is_duration
    return any(is_kind(kind) for is_kind in (*simple, *moment))


def _holds_image(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_image(kind.storage_type)
    if pt.is_dictionary(kind):
        return _holds_image(kind.value_type)
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return _holds_image(kind.value_type)
    if pt.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        known = {name: part for name, part in parts.items() if name in ("bytes", "path")}
        return bool(known) and all(
            is_text(part) or (name == "bytes" and _is_blob(part)) for name, part in known.items()
        )
    return is_bytes(kind) or is_text(kind)


def _id_type(name: str | None, schemas: Sequence[pa.Schema], paths: Sequence[str]) -> pa.DataType:
    """One type that holds the ids of all shards."""
    if name is None:
        return pa.string()
    kinds: dict[pa.DataType, str] = {}
    # each with the first shard that has it; a column of nulls says nothing
    for schema, path in zip(schemas, paths, strict=True):
        if name not in schema.names:
            raise UserError(
                f"{path}: no column {name!r}, which other shards have as their id; {LEAVE_OUT}"
            )
        mine = schema.field(name).type
        mine = mine.value_type if pt.is_dictionary(mine) else mine
        if not _is_id(mine):
            raise UserError(
                f"{path}: column {name!r} is {mine}, and an id is one value (text, bytes, UUID,"
                f" number, date or time); name another with --columns id=NAME, or {LEAVE_OUT}"
            )
        if not pt.is_null(mine):
            kinds.setdefault(mine, path)
    if len(kinds) <= 1:
        return next(iter(kinds), pa.string())
    if all(map(is_bytes, kinds)):
        return pa.binary()
    texts, numbers = (list(filter(is_kind, kinds)) for is_kind in (is_text, pt.is_integer))
    others = [kind for kind in kinds if kind not in (*texts, *numbers)]
    signed = list(filter(pt.is_signed_integer, numbers))
    if others:
        apart = others[0], next(kind for kind in kinds if kind != others[0])
    elif texts and numbers:
        apart = texts[0], numbers[0]
    elif signed and pa.uint64() in numbers:
        apart = pa.uint64(), signed[0]
    else:
        return pa.string() if texts else pa.uint64() if pa.uint64() in numbers else pa.int64()
    first, second = sorted(apart, key=list(kinds).index)
    raise UserError(
        f"{kinds[second]}: column {name!r} is {second}, but {first} in {kinds[first]};"
        f" give all shards one type, or {LEAVE_OUT}"
    )
