"""First-come-first-served scheduler, and limits that halve on out-of-memory. Loads no torch.

First come, first served: a request that does not fit yet is not overtaken, so that none starves.
Room for the whole answer is reserved on admission; nothing that runs is ever evicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from trio.engine.kv_budget import Need


class Schedulable(Protocol):
    """What the scheduler must know of a request."""

    @property
    def key(self) -> int: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def need(self) -> Need: ...


Item = TypeVar("Item", bound=Schedulable)


class Allocator(Protocol):
    """The owner of the memory, as the scheduler sees it."""

    def can_allocate(self, need: Need) -> bool: ...

    def allocate(self, key: int, need: Need) -> object: ...

    def free(self, key: int) -> None: ...


class Scheduler(Generic[Item]):
    """Admits waiting requests under a budget of tokens per step.

    `batch_tokens`: tokens that one step may compute, one for each running request and the whole
    prompt of each request that comes in. A prompt above the budget comes in alone.
    """

    def __init__(self, memory: Allocator, *, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.waiting: deque[Item] = deque()
        self.running: dict[int, Item] = {}
        self._memory = memory

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, item: Item) -> None:
        self.waiting.append(item)

    def admit(self) -> list[Item]:
        """Move the next requests from waiting to running, with their memory allocated."""
        admitted: list[Item] = []
        budget = self.batch_tokens - len(self.running)
        while self.waiting:
            item = self.waiting[0]
            if admitted and item.prompt_tokens > budget:
                break
            if not self._memory.can_allocate(item.need):
                break
            try:
                self._memory.allocate(item.key, item.need)
            except MemoryError:
                break
            self.running[item.key] = self.waiting.popleft()
            budget -= item.prompt_tokens
            admitted.append(item)
        return admitted

    def finish(self, item: Item) -> None:
        """Take a running request out and give its memory back."""
        del self.running[item.key]
        self._memory.free(item.key)

    def put_back(self, items: Sequence[Item]) -> None:
        """Let running requests wait again, first in the queue and in this order."""
        for item in reversed(items):
            self.finish(item)
            self.waiting.appendleft(item)

    def clear(self) -> None:
        """Drop all that wait or run, and give their memory back."""
        self.waiting.clear()
        for item in list(self.running.values()):
            self.finish(item)


PATIENCE = 64
"""Pieces of work that must go well before a limit that was cut is doubled."""
MOST_PATIENCE = 4096


@dataclass(slots=True)
class Limit:
    """A number that is lowered when memory runs out and doubled once work has gone well for long.

    Each cut doubles how long that is: a cut starts running requests over, and where memory stays
    short, trying again and again would leave none of them time to finish.
    """

    most: int
    """As it was set; it grows no further."""
    now: int = field(init=False)
    _patience: int = field(init=False, default_factory=lambda: PATIENCE)
    _next_patience: int = field(init=False, default_factory=lambda: PATIENCE)
    _went_well: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.now = self.most

    def cut(self, to: int) -> int:
        """Memory ran out; returns what it now is, at least 1 and never more than before."""
        self.now = max(1, min(to, self.now))
        self._went_well = 0
        self._patience = self._next_patience
        self._next_patience = min(2 * self._patience, MOST_PATIENCE)
        return self.now

    def went_well(self) -> int:
        """A piece of work within the limit fitted; returns what the limit now is."""
        if self.now < self.most:
            self._went_well += 1
            if self._went_well >= self._patience:
                self.now, self._went_well = min(self.most, 2 * self.now), 0
        return self.now
