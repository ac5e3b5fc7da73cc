"""How far a run is: lines rewritten in place on a terminal, one every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trio.job.output.summary import bottleneck, duration
from trio.job.output.totals import Totals
from trio.tables import counted

GAP = 3
"""Columns of a terminal between two figures."""


class Progress:
    """Shows how far a run is; a context manager that ends what it rewrites.

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
            rows: of the input.
            done_before: totals of the rows that earlier attempts committed.
            log_interval_s: between two lines where the stream is no terminal, in seconds.
            label: put before each line.
            stream: standard error when None.
            clock: gives seconds.
        """
        self._label = f"{label}: " if label else ""
        self._rows, self._before, self._new = rows, done_before, Totals()
        self._under_way = self._engines = 0
        self._clock = clock
        self._began = self._updated = clock()
        self._working_since: float | None = None
        self._console = Console(
            file=stream or sys.stderr, highlight=False, markup=False, emoji=False
        )
        self._live: Live | None = None
        self._interval, self._shown_at = log_interval_s, self._began
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Prints of others are left alone: what goes to standard output must stay there.
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._interval = 0.0

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._engines = 0
        if self._new.rows:
            self._show()
        if self._live is not None:
            self._live.stop()

    @property
    def done(self) -> Totals:
        return self._before + self._new

    @property
    def work_s(self) -> float:
        """Seconds from when the first engine was ready to the last unit that came back."""
        since = self._working_since
        return max(self._updated - since, 1e-9) if since is not None else 0.0

    @property
    def rows_left(self) -> int:
        """Rows of the input that are not committed."""
        return max(0, self._rows - self.done.inputs)

    @property
    def eta_s(self) -> float | None:
        """Estimate of the time that is left, in seconds; None before a unit is committed."""
        if self.rows_left == 0:
            return 0.0
        if self._working_since is None or not self._new.inputs:
            return None
        return self.rows_left * (self._clock() - self._working_since) / self._new.inputs

    @property
    def audit_s(self) -> float:
        """Of this attempt, seconds that engines spent on auditing."""
        return self._new.audit_s

    def say(self, text: str) -> None:
        """A line of its own, above what is rewritten."""
        self._console.print(self._label + text, soft_wrap=True)

    def answering(self, for_s: float = 0.0) -> None:
        """An engine is ready, and has been for some seconds."""
        since = self._clock() - for_s
        if self._working_since is None or since < self._working_since:
            self._working_since = since

    def alive(self, rows: int, engines: int = 0) -> None:
        """Once a second: engines have answered so many rows whose units are not committed yet; so
        many engines are ready."""
        if rows:
            self.answering()
        self._under_way, self._engines = rows, engines
        if self._clock() - self._shown_at >= self._interval:
            self._show()

    def add(self, totals: Totals, ready_s: float = 0.0) -> None:
        """A unit is committed; its engine has been ready for so long."""
        self.answering(ready_s)
        self._updated = self._clock()
        self._new += totals

    def line(self) -> str:
        """All of it, for a log."""
        return ", ".join([self._head(), *self._figures(), self._rest()])

    def lines(self) -> Table:
        """The same for a terminal of any width: figures are put side by side as they fit."""
        figures = self._figures()
        if self._engines:
            figures.append(f"{counted(self._engines, 'engine')} working")
        bar = ProgressBar(total=max(self._rows, 1), completed=self.done.inputs)
        cells = [Text(figure) for figure in (*figures, self._rest())]
        lines = Table.grid(expand=True)
        for line in (Text(self._head()), bar, Columns(cells, padding=(0, GAP))):
            lines.add_row(line)
        return lines

    def _head(self) -> str:
        percent = 100 * self.done.inputs / max(self._rows, 1)
        return f"{self._label}{self.done.inputs}/{self._rows} rows ({percent:.0f} %)"

    def _figures(self) -> list[str]:
        new, done, since = self._new, self.done, self._working_since
        if since is None or not new.rows:
            parts = ["starting" if since is None else "answering"]
            return parts + [f"{self._under_way} answered so far"] * bool(self._under_way)
        work_s = max((self._updated if self.rows_left == 0 else self._clock()) - since, 1e-9)
        parts = [
            f"{new.images / work_s:.1f} images/s",
            f"{new.output_tokens / work_s:.0f} tokens/s",
        ]
        if done.retention is not None:
            parts.append(f"retention {done.retention:.3f}")
        if (phase := bottleneck(new)) is not None:
            parts.append(phase)
        if done.errors:
            parts.append(f"{done.errors} in error")
        return parts

    def _rest(self) -> str:
        """What is left; before there is a rate, how long the run has been at work."""
        if self._working_since is None or not self._new.rows:
            return duration(self._clock() - self._began)
        return f"ETA {duration(self.eta_s or 0.0)}" if self.rows_left else "done"

    def _show(self) -> None:
        self._shown_at = self._clock()
        if self._live is not None:
            self._live.update(self.lines(), refresh=True)
        else:
            self._console.print(self.line(), soft_wrap=True)
