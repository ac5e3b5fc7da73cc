"""Boxes that a model writes, and how well they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from trio.errors import UserError
from trio.vqa.rules import rule_named

Box = tuple[float, float, float, float]

_NUMBER = r"-?\d+(?:\.\d+)?"
_BRACKETS = re.compile(rf"\[\s*({_NUMBER}),\s*({_NUMBER}),\s*({_NUMBER}),\s*({_NUMBER})\s*\]")
_QWEN = re.compile(r"\((.*?)\),\((.*?)\)")  # from the first bracket on, as its script


def parse_box(text: str, *, rule: str = "brackets") -> Box | None:
    """x1, y1, x2, y2 of the first box in a text; None if there is none, all four are 0, or one is
    past what a number holds.

    Args:
        rule: `brackets` (lmms-eval): `[x1, y1, x2, y2]`. `qwen` (Qwen-VL): `(x1,y1),(x2,y2)`, which
            its models write in 999ths of the picture's width and height.

    Returns:
        The numbers as they are written.
    """
    box = rule_named(_RULES, rule)(text)
    return box if box is not None and any(box) and all(map(math.isfinite, box)) else None


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Overlap of two boxes over their union, 0 to 1.

    Args:
        first, second: x1, y1, x2, y2, in the same unit.
    """
    for box in (first, second):
        if not is_box(box):
            raise UserError(f"a box is x1, y1, x2, y2, finite numbers, not {box!r:.80}")
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - overlap
    return overlap / union if union else 0.0


def is_box(value: Any) -> bool:
    """Whether it is four finite numbers."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 4:
        return False
    return all(isinstance(edge, Real) and math.isfinite(edge) for edge in value)


def center_inside(predicted: Sequence[float], true: Sequence[float]) -> bool:
    """Whether a box's centre lies in another, edges included."""
    x, y = (predicted[0] + predicted[2]) / 2, (predicted[1] + predicted[3]) / 2
    return true[0] <= x <= true[2] and true[1] <= y <= true[3]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _brackets(text: str) -> Box | None:
    found = _BRACKETS.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def _qwen(text: str) -> Box | None:
    found = _QWEN.search(text)
    if found is None:
        return None
    try:
        (x1, y1), (x2, y2) = (map(float, side.split(",")) for side in found.groups())
    except ValueError:
        return None
    return x1, y1, x2, y2


_RULES: dict[str, Callable[[str], Box | None]] = {"brackets": _brackets, "qwen": _qwen}
