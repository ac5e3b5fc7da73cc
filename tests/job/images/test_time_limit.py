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
from trio.job.images.time_limit import limited

ROOT = Path(__file__).resolve().parents[3]
NEVER_RETURNS = """
from trio.job.images import time_limit
time_limit.EXIT_S = 0.3
with time_limit.limited(0.2):
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
    with pytest.raises(RowError) as caught, limited(0.2):
        decode()
    assert time.monotonic() - began < 30
    assert caught.value.kind == "image_timeout" and "0.2 s (--row-timeout)" in str(caught.value)


def test_nothing_is_left_of_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    before, cancelled = signal.getsignal(signal.SIGALRM), []
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(1))
    with limited(5):
        pass
    with pytest.raises(ValueError, match="mine"), limited(5):
        raise ValueError("mine")
    with pytest.raises(RowError), limited(5):
        signal.raise_signal(signal.SIGALRM)
    assert signal.getsignal(signal.SIGALRM) is before and len(cancelled) == 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_decoder_that_never_returns_ends_with_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER_RETURNS], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "Timeout" in done.stderr
