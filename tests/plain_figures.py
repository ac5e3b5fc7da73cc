"""Figures of answers in plain Python, by the published definitions: none of it is the package's."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Z = 1.959963984540054
NEAR = 1e-7
Interval = tuple[float, float]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure, and which kind of interval it has."""

    value: float
    by: str | None
    interval: Interval | None = None
    draws: Sequence[float] = ()
    """Of a bootstrap, in place of the interval."""


def share(hits: Sequence[tuple[float, str]]) -> Figure:
    """Of rows in pictures: the mean of 0s and 1s with their pictures."""
    if not hits:
        return Figure(0.0, None)
    return Figure(math.fsum(h for h, _ in hits) / len(hits), "wilson", wilson(hits))


def wilson(hits: Sequence[tuple[float, str]]) -> Interval:
    """The shares that lie within Z standard errors of themselves: roots of a quadratic equation;
    with as many rows as there are over the design effect of their pictures."""
    n = len(hits)
    p = sum(hit for hit, _ in hits) / n
    off: dict[str, float] = defaultdict(float)
    for hit, picture in hits:
        off[picture] += hit - p
    worth: float = len(off)
    if 1 < len(off) < n and 0 < p < 1:
        variance = len(off) / (len(off) - 1) * sum(each**2 for each in off.values()) / n**2
        worth = n / max(1.0, variance / (p * (1 - p) / n))
    # (p - x)^2 = Z^2 x (1 - x) / worth
    a, b, c = 1 + Z**2 / worth, -(2 * p + Z**2 / worth), p**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def drawn(
    rows: Sequence[tuple[str, T]], figure: Callable[[Sequence[T]], U], *, draws: int = 1000
) -> list[U]:
    """A figure of rows whose pictures are drawn anew, so many times.

    Args:
        rows: each behind its picture.
        figure: of rows.
    """
    rng = random.Random(0)
    of_picture: dict[str, list[T]] = defaultdict(list)
    for picture, row in rows:
        of_picture[picture].append(row)
    pictures = list(of_picture.values())
    return [
        figure([row for some in rng.choices(pictures, k=len(pictures)) for row in some])
        for _ in range(draws)
    ]


def is_middle(interval: Sequence[float], draws: Sequence[float]) -> bool:
    """Whether an interval may hold the middle 95 % of what was drawn: draws of another seed leave
    1 to 5 % beyond each of its ends."""
    ordered, n = sorted(draws), len(draws)
    low, high = interval
    return (
        ordered[n // 100] - NEAR <= low <= ordered[n // 20] + NEAR
        and ordered[-n // 20] - NEAR <= high <= ordered[-n // 100] + NEAR
    )


def over(above: float, below: float) -> float:
    return above / below if below else 0.0


def pope(rows: Sequence[tuple[bool, bool, str]]) -> dict[str, float]:
    """POPE's script, for each category, and the means over categories.

    Args:
        rows: whether yes is said, whether it is true, and the category.
    """
    out: dict[str, float] = {}
    categories = sorted({category for *_, category in rows})
    for category in categories:
        own = [(said, true) for said, true, of in rows if of == category]
        hit, wrong = own.count((True, True)), own.count((True, False))
        missed = own.count((False, True))
        precision, recall = over(hit, hit + wrong), over(hit, hit + missed)
        out |= {
            f"{category}/accuracy": (len(own) - wrong - missed) / len(own),
            f"{category}/precision": precision,
            f"{category}/recall": recall,
            f"{category}/f1": over(2 * precision * recall, precision + recall),
            f"{category}/yes_ratio": (hit + wrong) / len(own),
        }
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        every = [out[f"{category}/{name}"] for category in categories]
        out[name] = math.fsum(every) / len(every)
    return out


def vqa_accuracy(said: str, people: Sequence[str]) -> float:
    """The mean over people of min(1, others who said that / 3)."""
    agree = [
        sum(said == other for n, other in enumerate(people) if n != left_out)
        for left_out in range(len(people))
    ]
    return sum(min(1.0, count / 3) for count in agree) / len(people)


def likelihoods(
    sums: Sequence[float], tokens: Sequence[int], *, by_tokens: bool
) -> dict[str, float | list[float]]:
    """What follows from the candidates' log-probabilities."""
    scores = [s / n for s, n in zip(sums, tokens, strict=True)] if by_tokens else list(sums)
    whole = sum(math.exp(score) for score in scores)
    ordered = sorted(scores)
    return {
        "p_choice": [math.exp(score) / whole for score in scores],
        "p_first": math.exp(sums[0]),
        "margin": ordered[-1] - ordered[-2],
        "best": float(scores.index(ordered[-1])),
    }


def calibration_bins(rows: Sequence[tuple[float, bool]], bins: int) -> float:
    """The expected calibration error over bins of equal width."""
    of_bin: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for sure, right in rows:
        of_bin[min(bins - 1, math.ceil(sure * bins) - 1)].append((sure, right))
    return sum(
        abs(sum(sure for sure, _ in own) - sum(right for _, right in own)) / len(rows)
        for own in of_bin.values()
    )


def fault(found: Mapping[str, Any], figure: Figure) -> str | None:
    """What is wrong with a figure of `metrics.json`; None if nothing."""
    if abs(found["value"] - figure.value) > NEAR:
        return f"value {found['value']}, not {figure.value}"
    if found["interval_by"] != figure.by:
        return f"interval by {found['interval_by']}, not {figure.by}"
    interval = found["interval"]
    if figure.draws and not is_middle(interval, figure.draws):
        return f"interval {interval} is not the middle of what is drawn"
    if figure.interval is not None:
        ends = zip(interval, figure.interval, strict=True)
        if any(abs(one - other) > NEAR for one, other in ends):
            return f"interval {interval}, not {figure.interval}"
    return None
