"""Where the processes of a pass leave notes for the driver, and the driver a request to stop.

A `Board` is in the actor that owns the pass; readers and engines hold a `Desk`, its handle.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorUnavailableError

POLL_S = 1.0
# between two looks at the request to stop
ALIVE_S = 5.0
# between two signs of life from a process that has brought nothing meanwhile
PATIENCE_S = 10.0
# for a note to arrive, before a process ends itself


@dataclass(frozen=True, slots=True)
class Note:
    """What a process says: its kind and whatever belongs to it.

    `begin` engine, node · `ready` engine, facts (a dict) · `failed` engine, reason,
    whether it is the user's to mend ·
    `died` engine, reason · `alive` engine, rows it has answered, its gauges (a dict) ·
    `preparing` (a sign of life) ·
    `user` a mistake of the user · `fail` why nobody can go on · `unread` unit, kind, message ·
    `say` a line
    """

    kind: str
    what: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the engines of a pass are doing at a moment."""

    answered: int
    """Rows they have answered whose units are not committed yet."""
    engines: Mapping[str, Mapping[str, float]]
    """Of each that is ready, by its name, what it says of itself: see `Engine._gauges`."""


class Board:
    """Notes in their order, and whether the pass is to stop. Called from several threads."""

    def __init__(self, *, later: bool = False) -> None:
        """later: engines of an earlier pass have just been ended."""
        self._later = later
        self._lock = threading.Lock()
        self._notes: list[Note] = []
        self._begun: Counter[str] = Counter()
        self._stop = False

    def note(self, kind: str, *what: Any) -> None:
        with self._lock:
            self._notes.append(Note(kind, what))

    def begin(self, engine: str, node: str) -> int:
        """An engine is to be built; returns how often one of this name was before, earlier passes
        counted as once."""
        with self._lock:
            self._notes.append(Note("begin", (engine, node)))
            self._begun[engine] += 1
            return self._begun[engine] - 1 + self._later

    def take(self) -> list[Note]:
        """Notes since the last call."""
        with self._lock:
            out, self._notes = self._notes, []
            return out

    def stop(self) -> None:
        self._stop = True

    def stopped(self) -> bool:
        return self._stop


@dataclass(frozen=True, slots=True)
class Desk:
    """A board in another process."""

    handle: Any

    def note(self, kind: str, *what: Any) -> None:
        self.handle.note.remote(kind, *what)

    def last_note(self, kind: str, *what: Any) -> None:
        """A note before a process or its stage ends: waits until it has arrived."""
        with suppress(Exception):  # the pass is over already
            ray.get(self.handle.note.remote(kind, *what), timeout=PATIENCE_S)

    def begin(self, engine: str, node: str) -> int:
        return int(ray.get(self.handle.begin.remote(engine, node)))

    def stopped(self) -> bool:
        return bool(ray.get(self.handle.stopped.remote()))

    def wait_for_the_end(self) -> NoReturn:
        """What was noted ends the pass, and with it this process."""
        while True:
            time.sleep(POLL_S)
            self.stopped()


class Poll:
    """The request to stop, asked for once in a while."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._asked_at, self._said = desk, float("-inf"), False

    def stopped(self) -> bool:
        if not self._said and time.monotonic() - self._asked_at > POLL_S:
            self._asked_at = time.monotonic()
            with suppress(ActorUnavailableError):  # for a moment: asked again
                self._said = self._desk.stopped()
        return self._said
