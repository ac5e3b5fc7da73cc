"""JSON schemas: what is followed, and that the rest is refused by its name and place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trio.engine.decoding.grammars import grammar_of
from trio.engine.decoding.json_schema import exact_schema
from trio.engine.request import Constraint
from trio.errors import UserError

WORD = {"type": "string", "maxLength": 5}


def one(**schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        WORD | {"title": "a word", "description": "of five letters", "default": "?"},
        one(enum=["red", 3, None]),
        one(type="string", enum=["red", "blue"]),
        one(type="integer", minimum=0, maximum=9, multipleOf=3),
        one(type="array", items=WORD, minItems=1, maxItems=2),
        one(anyOf=[WORD, {"type": "null"}], default=None, title="A"),
        {"$ref": "#/$defs/w", "$defs": {"w": WORD}},
        one(type=["string", "null"], maxLength=3),
        one(type="string", pattern="^[a-z]+$"),
        one(type="string", pattern=r"^(\w+|[^b]\d\s[ -~].)$"),
        {"$schema": "http://json-schema.org/draft-07/schema#", **WORD},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **WORD},
        one(type="string", format="date"),
        one(const={"x": [1, 2]}),
        one(allOf=[WORD]),
        {"type": "object", "properties": {}, "additionalProperties": WORD},
    ],
)
def test_what_is_followed(schema: dict[str, Any]) -> None:
    grammar_of(Constraint(json_schema=json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (one(type="string", pattern="^https"), r"a part of a text; write \^\.\.\.\$, or \^\("),
        (one(type="string", pattern=r"^a\$"), "a part of a text"),
        (one(type="string", pattern="^a|b$"), "a part of a text"),
        (one(type="string", pattern='^"$'), "names a character that JSON escapes"),
        (one(type="string", pattern=r"^a\\$"), "names a character that JSON escapes"),
        (one(type="string", pattern=r"^[a\n]$"), "names a character that JSON escapes"),
        (one(type="string", pattern=r"^\u0022$"), "names a character that JSON escapes"),
        (one(type="string", pattern=r"^\S+$"), "not the same to all readers of JSON"),
        (one(type="string", pattern=r"^[^\w]+$"), "not the same to all readers of JSON"),
        (one(type="string", format="date", maxLength=3), "'maxLength' beside 'format'"),
        (one(oneOf=[WORD, {"type": "null"}]), "properties.a: 'oneOf' is not followed; write 'any"),
        (one(type="object", minProperties=1, additionalProperties=True), "'minProperties' above"),
        ({"$schema": 3}, r"at \$.\$schema: 3 is no text"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "older than draft 6"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "older than draft 6"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": 3}, "3 is not of"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "$defs": [3]}, "is not of type"),
        ({"$schema": "https://example.org/own"}, "'https://example.org/own' is no draft known"),
        ("[" * 99_999, "no JSON: maximum recursion"),
        ("{", "JSON schema: no JSON"),
        ("[1]", "expected an object"),
        ("true", "expected an object"),
        ({"type": "text"}, r"at \$.type: 'text' is not valid"),
        (one(type="string", maxLength="5"), "'5' is not of type 'integer'"),
        (one(uniqueItems=True), r"at \$.properties.a: 'uniqueItems' is not followed"),
        (one(type="array", contains=WORD), "'contains' is not followed"),
        (one(maxLength=5), "'maxLength' needs 'type': 'string' beside it"),
        (one(type="number", multipleOf=0.1), "'multipleOf' needs 'type': 'integer'"),
        (one(typ="string"), "'typ' is not followed"),
        (one(**{"not": WORD}), "'not' is not followed"),
        (one(anyOf=[WORD], type="string"), "'type' beside 'anyOf' is not followed"),
        (one(allOf=[WORD, {"type": "string"}]), "'allOf' of several"),
        (one(type="string", enum=["red", 3]), "3 of enum is not what the rest asks for"),
        (one(type="string", pattern="a", maxLength=3), "lengths beside 'pattern'"),
        (one(type="string", pattern=r"\bred"), r"\\b is not followed"),
        (one(type="string", format="colour"), "format 'colour' is not followed"),
        (one(**{"$ref": "https://example.org/w"}), "not in this file"),
        ({"$ref": "#/$defs/w"}, "defs"),
        ({"type": "object", "properties": {}, "required": ["b"]}, "required 'b' is not among"),
        ({"type": "array", "items": one(nullable=True)}, r"items.properties.a: 'nullable'"),
        (one(type="integer", minimum=5, maximum=3), "minimum greater than maximum"),
    ],
)
def test_what_is_not_followed_is_refused(schema: Any, says: str) -> None:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(UserError, match=says) as raised:
        grammar_of(Constraint(json_schema=text))
    assert "\n" not in str(raised.value) and "/project" not in str(raised.value)


def test_patterns_are_translated_wherever_they_stand() -> None:
    inner = {"type": "string", "pattern": "a"}
    schema = {"$defs": {"d": inner}, **one(anyOf=[inner, {"type": "array", "items": inner}])}
    found = exact_schema(json.dumps(schema), lambda regex: regex + "!")
    assert found.count('"a!"') == 3 and '"a"' not in found.replace('"a":', "").replace('["a"]', "")
