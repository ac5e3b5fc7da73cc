"""Budget arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.errors import UserError
from trio.pruning.schedule import Schedule, Stage, tokens_per_layer


def average(schedule: Schedule, visual_tokens: int, layers: int) -> float:
    present = tokens_per_layer(visual_tokens, schedule.counts(visual_tokens), layers)
    return sum(present) / layers


def test_the_published_setting_comes_out_exactly() -> None:
    schedule = Schedule.for_retention(1 / 9, 32, 576)
    assert schedule.counts(576) == [(1, 92), (10, 54), (15, 22)]
    assert average(schedule, 576, 32) == 64.0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.integers(1, 3000), st.floats(0.01, 1.0))
def test_the_average_is_the_target_within_a_token_or_it_is_refused(
    layers: int, visual_tokens: int, retention: float
) -> None:
    """Refused where the layers before the first stage hold more, which see all tokens."""
    before = max(1, round(layers / 32 + 1e-9))
    if retention * visual_tokens * layers < before * (visual_tokens - 1):
        with pytest.raises(UserError, match="out of reach"):
            Schedule.for_retention(retention, layers, visual_tokens)
        return
    schedule = Schedule.for_retention(retention, layers, visual_tokens)
    assert abs(average(schedule, visual_tokens, layers) - retention * visual_tokens) <= 1.0
    schedule.check_depth(layers)
    counts = [keep for _, keep in schedule.counts(visual_tokens)]
    assert counts == sorted(counts, reverse=True)
    assert all(1 <= keep <= visual_tokens for keep in counts)


def test_out_of_reach_names_the_smallest_retention_and_that_one_works() -> None:
    with pytest.raises(
        UserError, match=r"8 decoder layers.*smallest retention is 0\.1265"
    ) as error:
        Schedule.for_retention(1 / 9, 8, 576)
    assert "layer 0" in str(error.value)
    assert abs(average(Schedule.for_retention(0.1265, 8, 576), 576, 8) / 576 - 0.1265) < 1 / 576


def test_full_retention_has_no_stages() -> None:
    assert Schedule.for_retention(1.0, 32, 576).stages == ()
    assert Schedule.for_retention(0.5, 32, 0).stages == ()


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.01, float("nan")])
def test_retention_outside_its_range(retention: float) -> None:
    with pytest.raises(UserError, match="retention must be in"):
        Schedule.for_retention(retention, 32, 576)


def test_parse_counts_and_ratios() -> None:
    assert Schedule.parse("1:92,10:54, 15:22").counts(576) == [(1, 92), (10, 54), (15, 22)]
    ratios = Schedule.parse("0:0.5,2:0.25")
    assert ratios.counts(576) == [(0, 288), (2, 144)]
    assert ratios.counts(1) == [(0, 1), (2, 1)]
    assert Schedule.parse("1:1.0").counts(7) == [(1, 7)]
    assert Schedule.parse(str(Schedule.parse("1:0.16,5:0.02"))) == Schedule.parse("1:0.16,5:0.02")


def test_small_images_are_left_as_they_are_by_large_counts() -> None:
    assert Schedule.parse("1:48,3:24,7:6").counts(40) == [(1, 40), (3, 24), (7, 6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not layer:keep"),
        ("1", "not layer:keep"),
        ("1:x", "not layer:keep"),
        ("1:92;10:54", "not layer:keep"),
        ("1:0", "at least 1"),
        ("1:-3", "at least 1"),
        ("-1:3", "layer must be"),
        ("1:1.5", r"outside \(0, 1\]"),
        ("1:0.0", r"outside \(0, 1\]"),
        ("1:nan", "not layer:keep"),
        ("10:54,1:92", "layers must rise"),
        ("1:54,1:50", "layers must rise"),
        ("1:54,10:92", "must not rise"),
        ("1:54,10:0.5", "not both"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.parse(text)


def test_a_stage_behind_the_last_layer_is_refused() -> None:
    with pytest.raises(UserError, match="last possible stage is at 7"):
        Schedule((Stage(8, 5),)).check_depth(8)
    Schedule((Stage(7, 5),)).check_depth(8)
