"""Prompts made of a row, and what they refuse."""

import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from trio.errors import UserError
from trio.vqa.presets.prompt_template import PromptTemplate

ROW = {
    "question": "Is it red? Say yes or no.",
    "hint": None,
    "empty": "",
    "choices": ["red", "blue"],
    "mixed": [1, None, 0.5],
    "none": [],
    "count": 3,
    "share": 0.25,
    "sure": True,
    "types": {"structural": "query", "deep": {"name": "x"}, "nothing": None},
    "L2-category": "shape",
}

FILLED = {
    "": "",
    "no fields": "no fields",
    "{question}": "Is it red? Say yes or no.",
    "{count} of {share}\n{count}": "3 of 0.25\n3",
    '{{"x": {count}}}': '{"x": 3}',
    "{{question}}": "{question}",
    "{types.structural}/{types.deep.name}": "query/x",
    "{L2-category}": "shape",
    "{empty}.": ".",
    "{choices:options}": "A. red\nB. blue",
    "{mixed:options}": "A. 1\nB. 0.5",
    "{choices:inline}": "(A) red (B) blue",
    "{hint:line}{question:line}{empty:line}end": "Is it red? Say yes or no.\nend",
    "{hint:or=N/A} {empty:or=a: b=c} {count:or=N/A}": "N/A a: b=c 3",
    "{types.nothing.below:or=-}": "-",
    "{question:without= Say yes or no.}": "Is it red?",
    "{question:without=Is it}": "Is it red? Say yes or no.",
    "{choices:join=, }|{none:join=, }|{mixed:join=}": "red, blue||10.5",
}

NOT_FILLED = {
    "{hint}": "^prompt: 'hint' is missing",
    "{hint:without=x}": "^prompt: 'hint' is missing",
    "{hint:options}": "^prompt: 'hint' is no list but missing",
    "{choices}": "^prompt: 'choices' is a list; give {choices:options}",
    "{choices:line}": "^prompt: 'choices' is no text or number but a list",
    "{question:options}": "^prompt: 'question' is no list but a str",
    "{sure}": "^prompt: 'sure' is no text or number but true or false",
    "{types}": "^prompt: 'types' is no text or number but a struct",
    "{types.semantic}": "^prompt: 'types.semantic': no 'semantic' among structural, deep, nothing",
    "{questoin}": "^prompt: 'questoin': no 'questoin' among question, hint,",
    "{question.text}": "^prompt: 'question.text': there is nothing named 'text' within",
}

NO_TEMPLATES = {
    "{question": "a brace that is meant as one is {{ or }}",
    "question}": "a brace that is meant as one is {{ or }}",
    "{}": "^'' is no column",
    "{types.}": r"^'types\.' is no column",
    "{choices[0]}": r"^'choices\[0\]' is no column",
    "{question!r}": "'question' takes no '!' and no braces",
    "{hint:or={question}}": "'hint' takes no '!' and no braces",
    "{choices:lettered}": "^unknown spec 'lettered' of 'choices'; known: options, inline, line, "
    "or=TEXT, without=TEXT, join=TEXT$",
    "{share:.2f}": r"^unknown spec '\.2f' of 'share'",
    "{hint:or}": "^unknown spec 'or' of 'hint'",
    "{hint:line=x}": "^unknown spec 'line=x' of 'hint'",
    "{hint:=}": "^unknown spec '=' of 'hint'",
}


@pytest.mark.parametrize("text", FILLED)
def test_filled(text: str) -> None:
    assert PromptTemplate(text).fill(ROW) == FILLED[text]


@pytest.mark.parametrize("text", NOT_FILLED)
def test_not_filled(text: str) -> None:
    with pytest.raises(UserError, match=NOT_FILLED[text]):
        PromptTemplate(text).fill(ROW)


@pytest.mark.parametrize("text", NO_TEMPLATES)
def test_no_templates(text: str) -> None:
    with pytest.raises(UserError, match=NO_TEMPLATES[text]) as raised:
        PromptTemplate(text)
    assert "\n" not in str(raised.value)


def test_fields_stand_once_and_in_order() -> None:
    template = PromptTemplate("{b:line}{{x}}{a.c}{b} {a.d}")
    assert template.fields == ("b", "a.c", "a.d")


def test_more_options_than_letters() -> None:
    options: dict[str, Any] = {"choices": ["x"] * 27}
    with pytest.raises(UserError, match="'choices' has 27 options; there are 26 letters"):
        PromptTemplate("{choices:options}").fill(options)


def test_templates_are_values() -> None:
    template = PromptTemplate("{question}")
    same, other = PromptTemplate("{question}"), PromptTemplate("{question} ")
    assert template == same != other
    assert len({template, same, other}) == 2
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template and copy.fill(ROW) == template.fill(ROW)
    with pytest.raises(FrozenInstanceError):
        template.text = "x"  # type: ignore[misc]
