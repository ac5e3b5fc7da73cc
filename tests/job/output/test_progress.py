"""The progress line."""

import io
import re

import pytest

from trio.job.output.progress import Progress
from trio.job.output.summary import duration
from trio.job.output.totals import Totals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that stands until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


UNIT = Totals(
    rows=10, inputs=10, errors=1, images=9, output_tokens=90, retention_sum=0.9, retention_rows=9,
    preprocess_wait_s=9.0, prefill_s=1.0,
)  # fmt: skip


def test_a_log_gets_whole_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(40, Totals(), log_interval_s=5, stream=stream, clock=clock) as progress:
        clock.now += 4
        progress.alive(0)
        clock.now += 3
        progress.alive(0)
        progress.answering()
        clock.now += 2
        progress.add(UNIT)
        clock.now += 1
        progress.add(UNIT)
        assert progress.work_s == 3
    first, second, last = stream.getvalue().splitlines()
    assert first == "0/40 rows (0 %), starting, 0:00"
    assert second == "0/40 rows (0 %), starting, 0:07"
    assert last == (
        "20/40 rows (50 %), 6.0 images/s, 60 tokens/s, retention 0.100, waiting for images 90 %,"
        " 2 in error, ETA 0:03"
    )


def test_rows_under_way_are_being_answered() -> None:
    clock = Clock()
    progress = Progress(40, Totals(), log_interval_s=9, stream=io.StringIO(), clock=clock)
    clock.now += 5
    assert progress.line() == "0/40 rows (0 %), starting, 0:05"
    progress.alive(0)
    assert progress.line() == "0/40 rows (0 %), starting, 0:05"
    progress.answering()
    clock.now += 4
    assert progress.line() == "0/40 rows (0 %), answering, 0:09"
    progress.alive(12)
    assert progress.line() == "0/40 rows (0 %), answering, 12 answered so far, 0:09"
    progress.add(UNIT)
    assert progress.line().startswith("10/40 rows (25 %), 2.2 images/s")


def test_a_terminal_is_rewritten_in_place_below_what_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(10, Totals(), log_interval_s=99, label="trio", stream=stream) as progress:
        progress.say("[7] requests at once :cat:")
        progress.add(UNIT)
    before, said = stream.getvalue().split("trio: [7] requests at once :cat:\n")
    assert "trio: 0/10 rows (0 %)" in before and before.endswith("\x1b[2K")  # erases a line
    assert said.startswith("trio: 0/10 rows (0 %)")
    last = plain(said.rpartition("\x1b[2K")[2])
    assert last[0] == "trio: 10/10 rows (100 %)"
    assert last[-1].split("   ")[-2:] == ["1 in error", "done"]


@pytest.mark.parametrize("width", [20, 32, 60, 80, 140])
def test_a_terminal_of_any_width_shows_every_figure_whole(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    with Progress(40, Totals(), log_interval_s=9, stream=stream, clock=clock) as progress:
        progress.answering()
        clock.now += 2
        progress.add(UNIT)
        progress.alive(0, 3)
        last = plain(stream.getvalue().rpartition("\x1b[2K")[2])
    assert last[0] == "10/40 rows (25 %)" and len(last[1]) == width
    assert max(map(len, last)) <= width
    figures = [
        "4.5 images/s", "45 tokens/s", "retention 0.100", "waiting for images", "90 %",
        "1 in error", "3 engines working", "ETA 0:06",
    ]  # fmt: skip
    text = " ".join(" ".join(last[2:]).split())
    assert [figure for figure in figures if figure not in text] == []
    assert len(last) <= (5 if width >= 60 else 11)


def plain(shown: str) -> list[str]:
    """Lines without colours and other controls."""
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_what_is_left() -> None:
    clock = Clock()
    progress = Progress(40, Totals(), log_interval_s=9, stream=io.StringIO(), clock=clock)
    assert (progress.rows_left, progress.eta_s) == (40, None)
    progress.answering()
    clock.now += 2
    progress.add(UNIT)
    assert (progress.rows_left, progress.eta_s) == (30, 6.0)
    for _ in range(3):
        progress.add(UNIT)
    assert (progress.rows_left, progress.eta_s) == (0, 0.0)


def test_rows_of_an_earlier_attempt_count_as_done_but_not_as_speed() -> None:
    before, clock = Totals(rows=900, inputs=900, images=900), Clock()
    progress = Progress(1000, before, log_interval_s=9, stream=io.StringIO(), clock=clock)
    progress.answering()
    clock.now += 10
    progress.add(Totals(rows=50, inputs=50, images=50))
    line = progress.line()
    assert line.startswith("950/1000 rows (95 %), 5.0 images/s")
    assert line.endswith("ETA 0:10")


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3600, 86399.6)] == [
        "0:00",
        "1:01",
        "1:00:00",
        "24:00:00",
    ]
