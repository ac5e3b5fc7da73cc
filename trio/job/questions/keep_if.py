"""Conditions on an answer's figures, for filtering sets of images and texts."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trio.errors import UserError

OF_LIKELIHOOD = ("p_first", "p_best", "margin")
"""Columns, and the largest of `p_choice`."""
OF_ALL = ("score", "logprob_mean")
HOW = "write comparisons with numbers, joined by and, or and not, as in 'p_first > 0.6'"
_COMPARE: dict[type, Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition, as Python writes it."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """UserError: it is none."""
        try:
            _evaluated(_tree(text), dict.fromkeys((*OF_LIKELIHOOD, *OF_ALL), 0.0), text)
        except (RecursionError, MemoryError) as error:
            raise UserError(f"{text!r:.80} is too deep; {HOW}") from error
        return cls(text)

    @property
    def names(self) -> frozenset[str]:
        """Figures that it speaks of."""
        nodes = ast.walk(_tree(self.text))
        return frozenset(node.id for node in nodes if isinstance(node, ast.Name))

    def check(self, *, likelihood: bool) -> None:
        """UserError: a figure in it is not to be had in this mode."""
        names = self.names
        absent = sorted(names.difference(OF_ALL[:1] if likelihood else OF_ALL, OF_LIKELIHOOD))
        absent += sorted(names.intersection(OF_LIKELIHOOD)) if not likelihood else []
        if absent:
            mode = "likelihood" if likelihood else "generate"
            raise UserError(f"--keep-if: there is no {absent[0]} with --mode {mode}")

    def holds(self, figures: Mapping[str, float | None]) -> bool | None:
        """Whether it holds; None where a figure is not there."""
        try:
            return bool(_evaluated(_tree(self.text), figures, self.text))
        except _Absent:
            return None


class _Absent(Exception):
    """A figure that this row does not have."""


@cache
def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{text!r:.80} is no condition; {HOW}") from error


def _evaluated(node: ast.expr, figures: Mapping[str, float | None], text: str) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            held = [_evaluated(value, figures, text) for value in values]
            return all(held)
        case ast.BoolOp(values=values):
            held = [_evaluated(value, figures, text) for value in values]
            return any(held)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluated(operand, figures, text)
        case ast.Compare(left=left, ops=ops, comparators=right) if all(
            type(op) in _COMPARE for op in ops
        ):
            sides = [_number(side, figures, text) for side in (left, *right)]
            pairs = zip(ops, sides, sides[1:], strict=False)
            return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
    raise UserError(f"{text!r:.80} is no condition; {HOW}")


def _number(node: ast.expr, figures: Mapping[str, float | None], text: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, figures, text)
        case ast.Name(id=name) if name in figures:
            figure = figures[name]
            if figure is None:
                raise _Absent
            return figure
        case ast.Name(id=name):
            known = ", ".join((*OF_LIKELIHOOD, *OF_ALL))
            raise UserError(f"{text!r:.80}: there is no figure {name!r}; there are {known}")
    raise UserError(f"{text!r:.80} is no condition; {HOW}")
