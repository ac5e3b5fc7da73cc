"""Grammars: what they accept, and of which tokenizers they can speak."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.test_preprocess import byte_level_processor
from tests.tiny.byte_level import metaspace_tokenizer
from tests.tiny.llava import tiny_processor
from trio.bundled import MODEL
from trio.engine.decoding.grammars import Grammars, GrammarWalk, grammar_of, token_texts
from trio.engine.request import Constraint
from trio.errors import UserError

STOP = 1


def grammars(tokenizer: Any, size: int = 300, eos: int = STOP) -> Grammars:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return Grammars(tokenizer, decode, size=size, stop_ids=frozenset([eos]))


@pytest.fixture(scope="module")
def bytewise() -> Grammars:
    return grammars(byte_level_processor().tokenizer)


def accepts(made: Grammars, constraint: Constraint, text: str) -> bool:
    """Whether an answer may be this text, letter by letter."""
    ids = byte_level_processor().tokenizer.backend_tokenizer.token_to_id
    walk = GrammarWalk(made.compiled(constraint), [STOP])
    letters = (ids({" ": "\u0120", "\n": "\u010a"}.get(letter, letter)) for letter in text)
    return all(walk.take(letter) for letter in letters) and walk.is_whole


TEXTS = ("", "a", "b", "ab", "a1", "a12", "a123", "a.b", "a b", "a\nb", "a]b", "]", "red 5", "x-y")


@pytest.mark.parametrize(
    "regex",
    [
        *(r"a\d{1,2}", r"^a(1|b)?$", r"a.b", r"a\.b", r"[^]a]b|.".replace("]a", r"\]a")),
        *(r"[a-z]+ ?\d?", r"(?:a|red) [5b]", r"\w-\w", r"[\w\]]*", r"a[^b]b", r"|a", r"a+?b*"),
    ],
)
def test_a_regex_accepts_what_python_matches(bytewise: Grammars, regex: str) -> None:
    found = {text: accepts(bytewise, Constraint(regex=regex), text) for text in TEXTS}
    assert found == {text: re.fullmatch(regex, text) is not None for text in TEXTS}
    assert True in found.values()
    some = next(text for text in TEXTS if found[text] and text.strip() == text)
    assert accepts(bytewise, Constraint(regex=regex), f" {some}"), "a space may come first"


CHARACTERS = [*map(chr, range(1, 128)), *"\x85\xa0\xe9\u0660\u3000\u4e2d\ud7ff\ue000\U0010ffff"]
PATTERNS = (
    r"\w",
    r"\s",
    ".",
    "[^a-]",
    "[-a]",
    r"[\w-]",
    r"[\^]",
    r"[\^a]",
    r"[\^-z]",
    "[^^]",
    r"\^",
)
"""Classes that a pattern of a schema may have as well."""
CLASSES = (
    *(r"\W", r"\d", r"\D", r"\S", r"[\s\S]", r"[^\s]", r"[^\W]", r"[\S]", "[^,-]", "[^-a]", "[a-]"),
    *("[+--]", "[^+--]", r"[^\w-]", r"[^\]a-]", "[[a&&b]", r"[\\a]", r"[^\n]", r"[\t-\r]"),
    *(r"[\x41-\u0043\u4e2d]", r"[\x01-\uffff]", *PATTERNS),
)


def taken(made: Grammars, constraint: Constraint, texts: Sequence[bytes]) -> set[bytes]:
    """Which texts an answer may be, byte by byte."""
    compiled, pieces = made.compiled(constraint), made._texts

    def takes(data: bytes) -> bool:
        walk = GrammarWalk(compiled, [STOP])
        return all(walk.take(pieces.index(bytes([one]))) for one in data) and walk.is_whole

    return {text for text in texts if takes(text)}


@pytest.mark.filterwarnings("ignore:Possible set|Possible nested:FutureWarning")
@pytest.mark.parametrize("regex", CLASSES)
def test_a_class_has_the_characters_that_python_matches(bytewise: Grammars, regex: str) -> None:
    texts = [*(one.encode() for one in CHARACTERS), b"\xed\xa0\x80"]  # and half a character
    found = taken(bytewise, Constraint(regex=regex), texts)
    assert found == {one.encode() for one in CHARACTERS if re.fullmatch(regex, one, re.ASCII)}


@pytest.mark.parametrize(
    "inner", [*PATTERNS, r"[ -~]", "[^\U0001f600]", "[ -\U0001f600]", r"(a|\^)"]
)
def test_a_pattern_has_the_same_but_what_json_escapes(bytewise: Grammars, inner: str) -> None:
    schema = Constraint(json_schema=json.dumps({"type": "string", "pattern": f"^{inner}$"}))
    texts = [*(f'"{one}"'.encode() for one in CHARACTERS), b'"\xed\xa0\x80"']
    plain = (one for one in CHARACTERS if one >= " " and one not in '"\\')
    matching = {f'"{one}"'.encode() for one in plain if re.search(f"^{inner}$", one, re.ASCII)}
    assert taken(bytewise, schema, texts) == matching


@pytest.mark.parametrize(
    ("regex", "says"),
    [
        ("a(", r"regex 'a\(': missing \)"),
        (r"\bword\b", r"\\b is not followed"),
        (r"[\b]", r"\\b is not followed"),
        (r"a\Z", r"\\Z is not followed"),
        (r"(a)\1", r"\\1 is not followed"),
        ("a$b", "in the middle is not followed"),
        ("a|^b", "in the middle is not followed"),
        ("[]a]", "write ] in a class"),
        (r"[a\ud800-\udfff]", "are no characters"),
        ("a{99999999999}", r"regex 'a\{9+\}': the repetition"),
        ("(" * 3000 + ")" * 3000, "recursion"),
        ("(?=a)b", "Lookahead is not supported"),
        ("(?i)a", "not supported"),
        ("(?P<name>a)", "not supported"),
        ("(?<name>a)", "unknown extension"),
    ],
)
def test_a_regex_that_would_mean_something_else_is_refused(regex: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        grammar_of(Constraint(regex=regex))
    assert "\n" not in str(raised.value) and ".cc" not in str(raised.value)


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (tiny_processor().tokenizer, "'USER:' and 'ASSISTANT:' together are 'USER: ASSISTANT:'"),
        (AutoTokenizer.from_pretrained(MODEL), "together are 'user assistant'"),
    ],
)
def test_tokens_that_do_not_spell_are_refused(tokenizer: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        grammars(tokenizer, size=80)
    assert "Give choices instead" in str(raised.value)


def test_tokens_that_decoding_cleans_up_do_not_spell() -> None:
    tokenizer = byte_level_processor().tokenizer
    with pytest.raises(UserError, match="do not"):
        token_texts(tokenizer, lambda ids: tokenizer.decode(ids).replace("in", "on"))


def test_tokens_of_either_kind_of_subwords_spell() -> None:
    bytewise = token_texts(
        byte_level_processor().tokenizer, byte_level_processor().tokenizer.decode
    )
    assert bytewise[:4] == [b""] * 4, "control tokens are no text"
    assert set(bytewise) >= {bytes([byte]) for byte in range(256)} | {b"image"}
    spaced = metaspace_tokenizer()
    texts = token_texts(spaced, lambda ids: spaced.decode(ids, skip_special_tokens=True))
    assert texts[spaced.convert_tokens_to_ids("\u2581yes")] == b" yes"
    assert texts[:3] == [b""] * 3 and texts[3:5] == [b"\x00", b"\x01"]


@pytest.mark.parametrize("constraint", [Constraint(regex="yes"), Constraint(json_schema="{}")])
def test_a_word_with_its_space_may_begin_an_answer(constraint: Constraint) -> None:
    tokenizer = metaspace_tokenizer()
    made = grammars(tokenizer, size=320, eos=2)
    words_GW = torch.zeros(1, 10, dtype=torch.int32)
    GrammarWalk(made.compiled(constraint), [2]).mask(words_GW, 0)
    bits = [bool(words_GW[0].tolist()[token // 32] >> token % 32 & 1) for token in range(320)]
    open_tokens = set(tokenizer.convert_ids_to_tokens([t for t in range(302) if bits[t]]))
    if constraint.regex:
        assert open_tokens == {
            "\u2581",
            "\u2581y",
            "\u2581ye",
            "\u2581yes",
            "y",
            "<0x20>",
            "<0x79>",
        }
    else:
        assert {
            "\u2581",
            "<0x7B>",
            "t",
            "1",
            "<0x22>",
        } <= open_tokens and "\u2581yes" not in open_tokens
    assert not any(bits[302:])


def test_json_has_no_raw_control_characters(bytewise: Grammars) -> None:
    schema = Constraint(json_schema='{"type": "string", "maxLength": 3}')
    assert accepts(bytewise, schema, '"a b"')
    assert not accepts(bytewise, schema, '"abcd"')
    walk = GrammarWalk(bytewise.compiled(schema), [STOP])
    token = byte_level_processor().tokenizer.backend_tokenizer.token_to_id
    assert walk.take(token('"')) and not walk.take(token("\u0109"))  # a tab


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if name == "xgrammar":
            raise ModuleNotFoundError("No module named 'xgrammar'", name="xgrammar")
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"needs xgrammar: pip install -e '\.\[structured\]'$"):
        grammar_of(Constraint(regex="a"))
