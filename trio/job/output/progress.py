"""One readable line: rewritten in place on a terminal, one every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from trio.job.output.summary import duration
from trio.job.output.totals import Totals

TERMINAL_INTERVAL_S = 0.5


class Progress:
    """Shows how far a run is; a context manager that ends its line.

    Rates count from when the first engine was ready, so loading the model does not spoil the
    estimate of the time left. All times are of this process's clock.
    """

    def __init__(
        self,
        rows: int,
        done_before: Totals,
        *,
        log_interval_s: float,
        label: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show.

        Args:
            rows: of the whole run.
            done_before: totals of the rows that earlier attempts committed.
            log_interval_s: between two lines where the stream is no terminal, in seconds.
            label: put before each line.
            stream: standard error when None.
            clock: gives seconds.
        """
        self._label = f"{label}: " if label else ""
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = TERMINAL_INTERVAL_S if self._terminal else log_interval_s
        self._rows, self._before, self._done = rows, done_before, done_before
        self._clock = clock
        self._began = self._updated = clock()
        self._working_since: float | None = None
        self._lock = threading.RLock()
        # of the counts, and of the stream: lines of two threads do not mix
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._shown = ""

    def __enter__(self) -> Progress:
        self._show()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._done is not self._before:
            self._show()
        if self._terminal:
            self._write("\n")

    @property
    def done(self) -> Totals:
        with self._lock:
            return self._done

    @property
    def work_s(self) -> float:
        """Seconds from when the first engine was ready to the last unit that came back."""
        with self._lock:
            since = self._working_since
            return max(self._updated - since, 1e-9) if since is not None else 0.0

    def say(self, text: str) -> None:
        """A line of its own, above the one that is rewritten."""
        with self._lock:
            start = "\r" if self._terminal else ""
            self._write(f"{start}{self._label}{text.ljust(len(self._shown))}\n")

    def answering(self) -> None:
        """An engine is ready, and takes its first unit now."""
        with self._lock:
            if self._working_since is None:
                self._working_since = self._clock()

    def add(self, totals: Totals) -> None:
        """A unit is committed."""
        self.answering()
        with self._lock:
            self._done = self._done + totals
            self._updated = self._clock()

    def _elapsed(self) -> float:
        """Seconds of work so far: up to now while rows are missing."""
        with self._lock:
            since = self._working_since
            if since is None:
                return 0.0
            whole = self._done.rows >= self._rows
            return max((self._updated if whole else self._clock()) - since, 1e-9)

    def line(self) -> str:
        done, work_s = self.done, self._elapsed()
        new = done.rows - self._before.rows
        percent = 100 * done.rows / max(self._rows, 1)
        share = f"{self._label}{done.rows}/{self._rows} rows ({percent:.0f} %)"
        if not new or work_s <= 0:
            state = "answering" if work_s > 0 else "starting"
            return f"{share}, {state}, {duration(self._clock() - self._began)}"
        images_s = (done.images - self._before.images) / work_s
        tokens_s = (done.output_tokens - self._before.output_tokens) / work_s
        parts = [share, f"{images_s:.1f} images/s", f"{tokens_s:.0f} tokens/s"]
        if done.retention is not None:
            parts.append(f"retention {done.retention:.3f}")
        if done.errors:
            parts.append(f"{done.errors} in error")
        left = (self._rows - done.rows) / (new / work_s)
        parts.append(f"ETA {duration(left)}" if done.rows < self._rows else "done")
        return ", ".join(parts)

    def _show(self) -> None:
        with self._lock:
            line = self.line()
            if self._terminal:
                self._write("\r" + line.ljust(len(self._shown)))
                self._shown = line
            else:
                self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _tick(self) -> None:
        while not self._stop.wait(self._interval):
            self._show()
