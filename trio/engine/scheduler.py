"""First-come-first-served scheduler, and limits that halve on out-of-memory. Loads no torch.

First come, first served: a request that does not fit yet is not overtaken, so that none starves.
Room for the whole answer is reserved on admission; nothing that runs is ever evicted.

A prefill has costs that do not depend on how many it serves, so requests come in together: they
wait until it is worth one, but for a few steps only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
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

    def count_fitting(self, needs: Iterable[Need]) -> int:
        """How many of these, from the first on, there is room for at once."""
        ...

    def allocate(self, key: int, need: Need) -> object | None:
        """None where there is no room for it now."""
        ...

    def free(self, key: int) -> None: ...


MANY_REQUESTS = 16
MANY_TOKENS = 48 * 1024
"""Either of them is worth a prefill."""
LONGEST_HOLD = 32
"""Steps that a request waits at most for others to come in with it."""


class Scheduler(Generic[Item]):
    """Admits waiting requests under a budget of tokens per step.

    Every running request adds one token to a step; prompts share what is left of `batch_tokens`.
    A prompt longer than all of it still comes in, alone.
    """

    def __init__(self, memory: Allocator, *, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.waiting: deque[Item] = deque()
        self.running: dict[int, Item] = {}
        self._memory = memory
        self._held = 0
        """Steps that requests have been held back for, though they could come in."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, item: Item) -> None:
        self.waiting.append(item)

    def admit(self) -> list[Item]:
        """Move the next requests from waiting to running, with their memory allocated."""
        if not self._is_worth_it():
            return []
        self._held = 0
        admitted: list[Item] = []
        budget = self.batch_tokens - len(self.running)
        while self.waiting:
            item = self.waiting[0]
            if admitted and item.prompt_tokens > budget:
                break
            if self._memory.allocate(item.key, item.need) is None:
                break
            self.running[item.key] = self.waiting.popleft()
            budget -= item.prompt_tokens
            admitted.append(item)
        return admitted

    def _is_worth_it(self) -> bool:
        """Whether enough requests can come in for a prefill of their own: many, a quarter of those
        that would run then, or all that wait; or whether they have been held back for long."""
        ready, tokens = self._ready()
        is_enough = (
            ready == min(MANY_REQUESTS, len(self.waiting))
            or 3 * ready > len(self.running)
            or tokens >= min(MANY_TOKENS, self.batch_tokens // 2)
        )
        self._held = self._held + 1 if ready and not is_enough else 0
        return bool(ready) and (is_enough or self._held > LONGEST_HOLD)

    def _ready(self) -> tuple[int, int]:
        """How many of the next requests could come in, no more than are many, and their tokens,
        with those of one that no longer fits into the step."""
        budget = self.batch_tokens - len(self.running)
        nearest = list(islice(self.waiting, MANY_REQUESTS))
        fitting = self._memory.count_fitting(item.need for item in nearest)
        tokens = 0
        for ready, item in enumerate(nearest[:fitting]):
            tokens += item.prompt_tokens
            if ready and tokens > budget:
                return ready, tokens
        return fitting, tokens

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
