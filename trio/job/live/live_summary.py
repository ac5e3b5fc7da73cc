"""``summary.json`` while a run lasts: its totals so far, for whoever looks.

Written by a thread of its own, so that a slow storage does not hold up the driver, and only while
the lease is held. What it says of an end (`failed`) is written when the run ends by an exception; a
process that is killed leaves `running`, as nobody is there to say otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import Any

from trio.errors import JobFailed, UserError, first_line, kind_and_line
from trio.job.output.output_directory import write_summary
from trio.job.output.summary import FAILED, RUNNING
from trio.job.resume.lease import Held, LeaseLost
from trio.job.storage import Location

INTERVAL_S = 30.0
WHY_LETTERS = 500
Figures = Callable[[str], Mapping[str, Any]]
"""Makes the summary for a state of the run."""


class LiveSummary:
    """A context manager around a run; writes nothing before `begin`."""

    def __init__(
        self, output: Location, held: Held, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare.

        Args:
            output: the run's directory.
            held: its lease.
            clock: gives seconds.
        """
        self._output, self._held, self._clock = output, held, clock
        self._figures: Figures | None = None
        self._say: Callable[[str], None] = print
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="live-summary")
        self._writing: Future[None] | None = None
        self._next, self._said = 0.0, False

    def __enter__(self) -> LiveSummary:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, LeaseLost):  # the storage may hang, and the output is another's
            self._pool.shutdown(wait=False, cancel_futures=True)
            return
        self.rest()
        self._pool.shutdown()
        if error is not None and self._figures is not None:
            # What ends the run is told already; the storage may be just that.
            with suppress(Exception):
                self._held.check()
                said = {**self._figures(FAILED), "why": why(error)}
                write_summary(self._output, said)

    def begin(self, figures: Figures, say: Callable[[str], None]) -> None:
        """The run's directory is claimed: write from now on.

        Args:
            figures: makes the summary.
            say: takes one line for the user, once, where it cannot be written.
        """
        self._figures, self._say = figures, say
        self.look()

    def look(self) -> None:
        """To be called often; writes every `INTERVAL_S` seconds, and never two at a time."""
        if self._figures is None or self._clock() < self._next or self._busy:
            return
        self._next = self._clock() + INTERVAL_S
        self._writing = self._pool.submit(self._write, self._figures(RUNNING))

    def rest(self) -> None:
        """Waits for what is being written; nothing follows until the next `look`."""
        if self._writing is not None:
            wait([self._writing])

    def end(self) -> None:
        """The run has written its last summary: nothing follows."""
        self._figures = None

    @property
    def _busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def _write(self, summary: Mapping[str, Any]) -> None:
        try:
            self._held.check()
            write_summary(self._output, summary)
        except LeaseLost:  # the driver finds out itself, and stops
            pass
        except Exception as error:  # stores have errors of their own
            if not self._said:
                self._said = True
                self._say(
                    f"summary.json could not be refreshed ({kind_and_line(error)}); it is tried"
                    f" again every {INTERVAL_S:.0f} s"
                )


def why(error: BaseException) -> str:
    """Why a run ended, in one line."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped"
    if isinstance(error, UserError | JobFailed):
        return first_line(error, WHY_LETTERS)
    return kind_and_line(error, WHY_LETTERS)
