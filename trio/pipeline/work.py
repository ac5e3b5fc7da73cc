"""Which unit goes to which actor next. Pure bookkeeping: no Ray, no clock.

INPUT runs of consecutive units; OUTPUT one unit at a time for an actor that asks. An actor keeps to
its run, so that it reads each row group once; when nothing else is left it takes the back half of
the longest run of another. What came back from a dead actor goes out first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

from trio.pipeline.plan import Unit


class WorkQueue:
    """The units that nobody has been given yet, or that came back."""

    def __init__(self, runs: Iterable[Iterable[Unit]]) -> None:
        self._waiting = deque(deque(run) for run in runs)
        self._held: dict[Hashable, deque[Unit]] = {}
        self._returned: deque[Unit] = deque()

    def __len__(self) -> int:
        parts = (self._returned, *self._waiting, *self._held.values())
        return sum(len(part) for part in parts)

    def __bool__(self) -> bool:
        return bool(self._returned or self._waiting or any(self._held.values()))

    def take(self, actor: Hashable) -> Unit | None:
        """The next unit for an actor; None when there is nothing left to give."""
        if self._returned:
            return self._returned.popleft()
        if not self._held.get(actor):
            run = self._waiting.popleft() if self._waiting else self._steal()
            if run is None:
                return None
            self._held[actor] = run
        return self._held[actor].popleft()

    def give_back(self, units: Iterable[Unit]) -> None:
        """Units that were given out and not done."""
        self._returned.extend(units)

    def forget(self, actor: Hashable) -> None:
        """The actor is gone: what is left of its run is the next one to be taken."""
        left = self._held.pop(actor, None)
        if left:
            self._waiting.appendleft(left)

    def _steal(self) -> deque[Unit] | None:
        longest = max(self._held.values(), key=len, default=None)
        if not longest:
            return None
        half = [longest.pop() for _ in range((len(longest) + 1) // 2)]
        return deque(reversed(half))
