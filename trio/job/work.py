"""Which unit goes to which actor next. Pure bookkeeping: no Ray, no clock.

INPUT runs of consecutive units; OUTPUT one unit at a time for an actor that asks. An actor keeps to
its run, so that it reads each row group once; when nothing else is left it takes the back half of
the longest run of another. What came back from a dead actor goes out first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

from trio.job.input.units import Unit


class WorkQueue:
    """The units that nobody has been given yet, or that came back."""

    def __init__(self, runs: Iterable[Iterable[Unit]]) -> None:
        self._waiting = deque(deque(run) for run in runs)
        self._held: dict[Hashable, deque[Unit]] = {}
        self._returned: deque[Unit] = deque()
        self._left = sum(map(len, self._waiting))

    def __len__(self) -> int:
        return self._left

    def take(self, actor: Hashable) -> Unit | None:
        """The next unit for an actor; None when there is nothing left to give."""
        if not self._left:
            return None
        self._left -= 1
        if self._returned:
            return self._returned.popleft()
        if not self._held.get(actor):
            self._held[actor] = self._waiting.popleft() if self._waiting else self._half_a_run()
        return self._held[actor].popleft()

    def give_back(self, units: Iterable[Unit]) -> None:
        """Units that were given out and not done."""
        before = len(self._returned)
        self._returned.extend(units)
        self._left += len(self._returned) - before

    def forget(self, actor: Hashable) -> None:
        """The actor is gone: what is left of its run is the next one to be taken."""
        left = self._held.pop(actor, None)
        if left:
            self._waiting.appendleft(left)

    def _half_a_run(self) -> deque[Unit]:
        longest = max(self._held.values(), key=len)
        half = [longest.pop() for _ in range((len(longest) + 1) // 2)]
        return deque(reversed(half))
