"""How far a long measurement has come."""

from __future__ import annotations

import time
from datetime import timedelta


class Clock:
    """Says at the end of each of so many steps how long it took and how long it may still take."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._ends = [time.monotonic()]

    def lap(self) -> str:
        """One more step is done."""
        self._ends.append(time.monotonic())
        began, *ends = self._ends
        done = len(ends)
        text = f"{done}/{self._steps} after {_clock_time(ends[-1] - began)}"
        if 1 < done < self._steps:
            # The first step is left out, as it warms up and often is the longest.
            each = (ends[-1] - ends[0]) / (done - 1)
            text += f", about {_clock_time(each * (self._steps - done))} to go"
        return text


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
