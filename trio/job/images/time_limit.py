"""An end to rows whose images take too long to fetch or decode."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trio.job.images.policy import RowError

EXIT_S = 5.0
"""Beyond the limit, after which, or after twice as much, a decoder that ignores the alarm ends with
its process."""
STDERR = 2
"""The descriptor: what stands in `sys.stderr` (a notebook, a test) need not have one."""


class _Late(BaseException):
    """Passes through whatever a decoder catches."""


class TimeLimit:
    """Of each row of a unit; a context manager around all of them.

    Only in a main thread: no other gets signals.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._here = threading.current_thread() is threading.main_thread()
        self._ends_at = float("-inf")
        # when the process will be ended

    def __enter__(self) -> TimeLimit:
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def row(self) -> Iterator[None]:
        """Raises RowError in the block when the time is over; ends the process if that does not
        help, as in a decoder that never returns to Python."""
        if not self._here:
            yield
            return
        self._arm()
        before = signal.signal(signal.SIGALRM, _late)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self._seconds)
                yield
            finally:  # the alarm may come here too, but then it has been the only one
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Late as error:
            reason = f"fetching and decoding took more than {self._seconds:g} s (--row-timeout)"
            raise RowError("image_timeout", reason) from error
        finally:
            signal.signal(signal.SIGALRM, before)

    def _arm(self) -> None:
        """Put the end of the process off, where it would come too soon: each time starts a thread,
        which costs more than a small image."""
        now = time.monotonic()
        if self._ends_at - now < self._seconds + EXIT_S:
            self._ends_at = now + self._seconds + 2 * EXIT_S
            faulthandler.dump_traceback_later(self._ends_at - now, exit=True, file=STDERR)


def _late(*_: object) -> None:
    raise _Late
