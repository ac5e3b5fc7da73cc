"""An end to rows whose images take too long to fetch or decode."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trio.job.images.policy import RowError

EXIT_S = 5.0
"""Beyond the limit, after which a decoder that ignores the alarm ends with its process."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises RowError in the block when the time is over; ends the process if that does not help,
    as in a decoder that never returns to Python."""

    def late(*_: object) -> None:
        reason = f"fetching and decoding took more than {seconds:g} s (--row-timeout)"
        raise RowError("image_timeout", reason)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + EXIT_S, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
