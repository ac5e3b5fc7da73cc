"""What the metrics share: choosing a rule, lists of texts, letters, and the tables beside them."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from trio.errors import UserError

T = TypeVar("T")
LETTERS = string.ascii_uppercase
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rule_named(rules: Mapping[str, T], rule: str) -> T:
    """What stands for a rule.

    Raises:
        UserError: no such rule.
    """
    if rule not in rules:
        raise UserError(f"unknown rule {rule!r}; known: {', '.join(rules)}")
    return rules[rule]


def texts(values: Sequence[str], name: str = "answers") -> Sequence[str]:
    """What a score is made against: a list of texts, not empty.

    Raises:
        UserError: it is something else; says so of `name`.
    """
    if not are_texts(values):
        raise UserError(f"{name}: a list of texts is needed, not {values!r:.60}")
    if not len(values):
        raise UserError(f"{name} is empty")
    return values


def are_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return not isinstance(value, str) and (
        isinstance(value, Collection) and all(isinstance(text, str) for text in value)
    )


def letters_of(choices: Sequence[str]) -> tuple[str, ...]:
    """A, B, ...: one for each choice."""
    return tuple(LETTERS[: len(choices)])


def without_punctuation(text: str) -> str:
    """In lower case and without ASCII punctuation."""
    return text.lower().translate(_NO_PUNCTUATION)


@cache
def table(name: str) -> Mapping[str, Any]:
    """A file of `tables/`."""
    text = files("trio.vqa").joinpath(f"tables/{name}.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found
