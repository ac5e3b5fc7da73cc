"""Images that take too long: an alarm where Python hears it, the end of the process where not."""

from __future__ import annotations

import faulthandler
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trio.job.images.policy import RowError
from trio.job.images.time_limit import EXIT_S, TimeLimit

ROOT = Path(__file__).resolve().parents[3]
NEVER_RETURNS = """
from trio.job.images import time_limit
time_limit.EXIT_S = 0.3
with time_limit.TimeLimit(0.2) as limit, limit.row():
    sum(range(10**12))  # in C all the time, with the GIL held
"""


def test_what_takes_too_long_is_the_rows_error() -> None:
    """Whatever errors a decoder or its callers catch."""

    def decode() -> None:
        try:
            time.sleep(60)
        except Exception as error:
            raise ValueError("decoding failed") from error

    began = time.monotonic()
    with TimeLimit(0.2) as limit:
        for _ in range(2):
            with pytest.raises(RowError) as caught, limit.row():
                decode()
            assert caught.value.kind == "image_timeout"
            assert "0.2 s (--row-timeout)" in str(caught.value)
    assert time.monotonic() - began < 30


def test_nothing_is_left_of_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = signal.getsignal(signal.SIGALRM), []
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("end"))
    with TimeLimit(5) as limit:
        for _ in range(3):
            with limit.row():
                pass
        with pytest.raises(ValueError, match="mine"), limit.row():
            raise ValueError("mine")
        with pytest.raises(RowError), limit.row():
            signal.raise_signal(signal.SIGALRM)
    assert signal.getsignal(signal.SIGALRM) is before and calls == ["end"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_end_of_the_process_is_put_off_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row may take its seconds and some more, however many came before it."""
    now, ends = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda after, **_: ends.append(now[0] + after)
    )
    with TimeLimit(60) as limit:
        for _ in range(200):
            with limit.row():
                assert ends[-1] >= now[0] + 60 + EXIT_S
                now[0] += 1.5
    assert len(ends) <= 200 * 1.5 / EXIT_S + 1


def test_a_decoder_that_never_returns_ends_with_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER_RETURNS], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "Timeout" in done.stderr
