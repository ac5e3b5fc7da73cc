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


STDERR = 2
"""The descriptor: what stands in `sys.stderr` (a notebook, a test) need not have one."""


class _Late(BaseException):
    """Passes through whatever a decoder catches."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises RowError in the block when the time is over; ends the process if that does not help,
    as in a decoder that never returns to Python. Only in a main thread: no other gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _late)
    try:
        faulthandler.dump_traceback_later(seconds + EXIT_S, exit=True, file=STDERR)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late as error:
        reason = f"fetching and decoding took more than {seconds:g} s (--row-timeout)"
        raise RowError("image_timeout", reason) from error
    finally:  # also where the alarm comes at the very end
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _late(*_: object) -> None:
    raise _Late
