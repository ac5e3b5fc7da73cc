"""The progress line."""

import io
import time

import pytest

from trio.pipeline.progress import Progress
from trio.pipeline.summary import duration
from trio.pipeline.totals import Totals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


UNIT = Totals(
    rows=10, errors=1, images=9, output_tokens=90, retention_sum=0.9, retention_rows=9
)  # fmt: skip


def test_a_log_gets_whole_lines() -> None:
    stream = io.StringIO()
    with Progress(40, Totals(), log_interval_s=0.05, stream=stream) as progress:
        progress.add(UNIT, time.time() - 1.0)
        time.sleep(0.2)
        progress.add(UNIT, time.time())
        assert progress.work_s == pytest.approx(1.2, abs=0.3)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "0/40 rows (0 %), starting, 0:00"
    assert len(lines) >= 3 and "\r" not in stream.getvalue()
    assert lines[-1].startswith("20/40 rows (50 %), ")
    for part in ("images/s", "tokens/s", "retention 0.100", "2 in error", "ETA 0:0"):
        assert part in lines[-1]


def test_what_is_said_gets_a_line_of_its_own() -> None:
    stream = Terminal()
    with Progress(10, Totals(), log_interval_s=99, label="trio", stream=stream) as progress:
        progress.say("7 requests at once")
        progress.add(UNIT, time.time() - 1.0)
    said = stream.getvalue().split("\n")[0].split("\r")[-1]
    assert said.rstrip() == "trio: 7 requests at once"


def test_a_terminal_is_rewritten_in_place() -> None:
    stream = Terminal()
    with Progress(10, Totals(), log_interval_s=99, label="trio", stream=stream) as progress:
        progress.add(UNIT, time.time() - 1.0)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.count("\r") == 2
    assert "trio: 10/10 rows (100 %)" in text and text.rstrip().endswith("done")


def test_rows_of_an_earlier_attempt_count_as_done_but_not_as_speed() -> None:
    progress = Progress(1000, Totals(rows=900, images=900), log_interval_s=9, stream=io.StringIO())
    progress.add(Totals(rows=50, images=50), time.time() - 10)
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
