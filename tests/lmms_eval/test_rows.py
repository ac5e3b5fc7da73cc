"""Rows: pictures that are read, answers that share a prompt, failures that are named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from PIL import Image

from trio.engine.request import Result, failed
from trio.errors import UserError
from trio.lmms_eval.rows import Row, grouped, served, warn_of_marks

PICTURE = Image.new("RGB", (8, 8))


def row(prompt: str = "what?", doc_id: int = 3) -> Row:
    return Row(prompt=prompt, task="mine", split="test", doc_id=doc_id)


def pictures(shown: Any) -> tuple[Any, ...]:
    return row().pictures({"mine": {"test": {3: "document"}}}, lambda _: shown)


@pytest.mark.parametrize(
    ("shown", "count"), [([PICTURE, PICTURE], 2), (PICTURE, 1), ([], 0), (None, 0)]
)
def test_pictures(shown: Any, count: int) -> None:
    assert pictures(shown) == (PICTURE,) * count


def test_a_task_without_pictures() -> None:
    assert row().pictures({}, None) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shown", "name"), [(["clip.mp4"], "str 'clip.mp4'"), ([{"array": [0.0]}], "dict")]
)
def test_videos_and_audio_are_refused_with_the_row(shown: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"task mine, row 3: {name} is not read: only PIL images"):
        pictures(shown)


def test_answers_about_one_row_share_its_prompt() -> None:
    asked = [
        (row(doc_id=1), len, " yes"),
        (row(doc_id=2), len, " yes"),
        (row(doc_id=1), len, " no"),
        (row(doc_id=1), len, " yes"),
        (row("another?", 1), len, " no"),
    ]
    first, second, third = grouped(asked)
    assert first.candidates == (" yes", " no")
    assert first.places == [(0, " yes"), (2, " no"), (3, " yes")]
    assert (second.places, third.places) == ([(1, " yes")], [(4, " no")])


def test_a_failed_row_is_named() -> None:
    fine = Result(id=0, finish_reason="stop", response="")
    assert served(fine, row()) is fine
    with pytest.raises(UserError, match="task mine, row 3: too_long: it is"):
        served(failed(0, "too_long", "it is"), row())


def test_marks_of_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_marks(["what?"])
        assert not caplog.records
        warn_of_marks(["<image>\nwhat?", "what?"])
    assert "1 of 2 prompts say <image>" in caplog.text
