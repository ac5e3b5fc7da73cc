"""Which JSON schemas a grammar can follow exactly: what it would pass over is refused by name.

No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trio.errors import UserError, first_line

ANNOTATIONS = frozenset({
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "discriminator", "$defs", "definitions"),
})  # fmt: skip
"""What says nothing about a value by itself."""
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
"""What is followed of a type."""
ALONE = ("$ref", "anyOf", "allOf", "enum", "const")
"""What is followed where nothing else says what a value is."""
FORMATS = (
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
    *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
)
_ALL_OF_TYPES = frozenset(word for words in OF_TYPE.values() for word in words)


def exact_schema(text: str, translate: Callable[[str], str]) -> str:
    """A JSON schema with its regexes translated.

    Raises:
        UserError: it is none, or cannot be followed exactly.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"JSON schema: no JSON: {first_line(error)}") from error
    if not isinstance(schema, dict):
        raise UserError(f"JSON schema: expected an object, got {text.strip()!r:.60}")
    _check(schema, "$", _validator(schema))
    for one in _all(schema):
        if "pattern" in one:
            one["pattern"] = translate(one["pattern"])
    return json.dumps(schema, ensure_ascii=False)


def _validator(schema: Mapping[str, Any]) -> Any:
    """That of its draft, by which it is a schema, as by the newest."""
    from jsonschema import (
        Draft3Validator,
        Draft4Validator,
        Draft202012Validator,
        SchemaError,
    )
    from jsonschema.validators import validator_for

    draft = schema.get("$schema", "")
    if not isinstance(draft, str):
        raise _wrong("$.$schema", f"{draft!r:.60} is no text")
    # None gives None where there is no such draft.
    validator: Any = validator_for(schema, None) if draft else Draft202012Validator
    if validator in (None, Draft3Validator, Draft4Validator):
        what = "is no draft known" if validator is None else "is older than draft 6"
        newest = Draft202012Validator.META_SCHEMA["$id"]
        raise _wrong("$.$schema", f"{draft!r:.60} {what}; write it as of {newest}")
    try:
        validator.check_schema(schema)
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _wrong(error.json_path, error.message) from error
    return validator


def _wrong(where: str, what: str) -> UserError:
    return UserError(f"JSON schema, at {where}: {what}")


def _check(schema: Any, where: str, validator: Any) -> None:
    """A schema and those in it; `where` it lies, `validator` of its draft."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(where, "expected one schema")
    words = set(schema) - ANNOTATIONS
    if "oneOf" in words:
        raise _wrong(where, "'oneOf' is not followed; write 'anyOf'")
    alone = sorted(words.intersection(ALONE))
    if alone:
        _check_alone(schema, alone[0], words, where, validator)
    else:
        _check_typed(schema, words, where)
    for path, inner in _inner(schema):
        _check(inner, f"{where}.{path}", validator)


def _check_alone(
    schema: Mapping[str, Any], word: str, words: set[str], where: str, validator: Any
) -> None:
    """`words`: of the schema; `word`: the one that is to say what a value is."""
    if word in ("enum", "const") and words <= {word} | {"type"} | _ALL_OF_TYPES:
        for value in schema["enum"] if word == "enum" else [schema["const"]]:
            if not validator(schema).is_valid(value):
                raise _wrong(where, f"{value!r:.40} of {word} is not what the rest asks for")
        return
    if len(words) > 1:
        other = min(words - {word})
        raise _wrong(where, f"{other!r} beside {word!r} is not followed; put it inside")
    if word == "allOf" and len(schema["allOf"]) > 1:
        raise _wrong(where, "'allOf' of several is not followed; write them as one")
    if word == "$ref" and not schema["$ref"].startswith("#"):
        raise _wrong(where, f"{schema['$ref']!r:.60} is not in this file; put it below $defs")


def _check_typed(schema: Mapping[str, Any], words: set[str], where: str) -> None:
    given = schema.get("type", [])
    types = [given] if isinstance(given, str) else given
    known = {word for one in types for word in OF_TYPE.get(one, ())} | {"type"}
    for word in sorted(words - known):
        of = [one for one, its in OF_TYPE.items() if word in its]
        if of and not set(of) & set(types):
            raise _wrong(where, f"{word!r} needs 'type': {of[0]!r} beside it")
        raise _wrong(where, f"{word!r} is not followed; leave it out")
    missing = sorted(set(schema.get("required", ())) - set(schema.get("properties", ())))
    if missing:
        raise _wrong(where, f"required {missing[0]!r} is not among its properties")
    lengths = words & {"minLength", "maxLength"}
    if lengths and "pattern" in schema:
        raise _wrong(where, "lengths beside 'pattern' are not followed; put them into it")
    if lengths and "format" in schema:
        raise _wrong(where, f"{min(lengths)!r} beside 'format' is not followed; leave it out")
    if schema.get("format") not in (None, *FORMATS):
        raise _wrong(where, f"format {schema['format']!r} is not followed; leave it out")
    if words & {"pattern"} and words & {"format"}:
        raise _wrong(where, "'format' beside 'pattern' is not followed; leave it out")
    is_open = schema.get("additionalProperties", False) is not False
    if is_open and schema.get("minProperties", 0) > len(schema.get("required", ())):
        raise _wrong(where, "'minProperties' above what is required is not followed; name more")


def _all(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those in it."""
    if isinstance(schema, dict):
        yield schema
        for _, inner in _inner(schema):
            yield from _all(inner)


def _inner(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The schemas in a schema, with their places."""
    found: list[tuple[str, Any]] = []
    for word in ("properties", "$defs", "definitions"):
        found += [(f"{word}.{name}", one) for name, one in schema.get(word, {}).items()]
    for word in ("prefixItems", "anyOf", "allOf"):
        found += [(f"{word}[{number}]", one) for number, one in enumerate(schema.get(word, ()))]
    for word in ("items", "additionalProperties"):
        if word in schema:
            found.append((word, schema[word]))
    return found
