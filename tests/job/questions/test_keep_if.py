"""Conditions of --keep-if."""

import pytest

from trio.errors import UserError
from trio.job.questions.keep_if import Condition

FIGURES = {"p_first": 0.7, "p_best": 0.7, "margin": 1.5, "score": 0.0, "logprob_mean": -0.25}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("p_first > 0.6", True),
        ("p_first > 0.7", False),
        ("p_first >= 0.7", True),
        ("0.6 < p_first < 0.7", False),
        ("0.6 < p_first <= p_best", True),
        ("  margin>1 ", True),
        ("margin < 1" + 400 * "0", True),
        ("logprob_mean > -1", True),
        ("logprob_mean > --1", False),
        ("score < 1 and margin < 1", False),
        ("score < 1 or margin < 1", True),
        ("not score >= 1", True),
        ("not (score < 1 and p_first > 0.6)", False),
        ("score > 0 and margin > 0 or p_first > 0.5", True),
    ],
)
def test_a_condition_is_as_in_python(text: str, holds: bool) -> None:
    assert Condition.parse(text).holds(FIGURES) is holds


@pytest.mark.parametrize(
    "text",
    ["p_first > 0.6", "score < 1 and p_first > 0.6", "score < 1 or p_first > 0.6",
     "score > 1 and p_first > 0.6", "not p_first > 0.6"],
)  # fmt: skip
def test_what_lacks_a_figure_neither_holds_nor_fails(text: str) -> None:
    assert Condition.parse(text).holds(FIGURES | {"p_first": None}) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "p_first", "0.6", "p_first >", "p_first == 0.6", "p_first != 0.6", "p_first is 1",
        "score in (0, 1)", "p_first > '0.6'", "p_first > True", "p_first + 1 > 1",
        "p_first > abs(1)", "p_first > 1 if score else 0", "p_first.real > 0", "(p_first > 0)(1)",
        "p_first > 1j",
        "lambda: 1", "p_first > 0; 1", "import os", "__import__('os') > 1", "[1 > 0]",
        "1 > 0 > None", "+p_first > 0", "p_first > 0 and margin", "not margin", "x" * 500,
        "p_first > 0\0",
        "score > 2 and p_first",
    ],
)  # fmt: skip
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UserError) as raised:
        Condition.parse(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_an_unknown_figure_is_named_with_those_that_are_known() -> None:
    says = "there is no figure 'p_fist'; there are p_first, p_best, margin, score, logprob_mean"
    for text in ("p_fist > 0.5", "p_first > 2 and p_fist > 1", "p_first > -1 or p_fist > 1"):
        with pytest.raises(UserError, match=says):
            Condition.parse(text)


@pytest.mark.parametrize(
    ("text", "likelihood", "absent"),
    [
        ("p_first > 0.5", True, None),
        ("margin > 1 and p_best > 0.5 and score > 0", True, None),
        ("score > 0.5 or logprob_mean > -1", False, None),
        ("score > 0.5 and logprob_mean > -1", True, "logprob_mean with --mode likelihood"),
        ("p_first > 0.5", False, "p_first with --mode generate"),
        ("score > 0.5 or not margin < 1", False, "margin with --mode generate"),
    ],
)
def test_figures_belong_to_modes(text: str, likelihood: bool, absent: str | None) -> None:
    condition = Condition.parse(text)
    if absent is None:
        condition.check(likelihood=likelihood)
        return
    with pytest.raises(UserError, match=f"^--keep-if: there is no {absent}$"):
        condition.check(likelihood=likelihood)
