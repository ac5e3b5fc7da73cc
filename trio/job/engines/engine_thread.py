"""Engines in a thread of their own, fed by the threads that ask them. No Ray in here.

INPUT batches of requests from any number of calling threads; OUTPUT each batch's outcomes in its
own order, one for each request. Requests of all batches share the engine, so a slow one delays only
its own batch; how far preparation runs ahead of the engine is bounded.

There is an engine for each setting that is compared. They take turns: the next one begins when the
one before has nothing left, so that none is slowed down by another and each can be timed.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError, kind_and_line
from trio.job.engines.engine_settings import EngineLike
from trio.job.images.policy import RowError

Outcome = Result | RowError
COUNT_S = 1.0
"""Between two looks at the counters of an engine that gives no results meanwhile."""


class EngineDied(RuntimeError):
    """The engine failed: nothing more can be answered in this process."""


@dataclass(slots=True)
class _Batch:
    outcomes: list[Outcome | None]
    open: int
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, slots=True)
class _Ticket:
    """Place of one row: goes into the engine as the request's id and comes back in its result."""

    batch: _Batch
    index: int
    setting: int


Asked = Request | Prepared | RowError


class EngineThread:
    """Owner of engines; ``answer`` may be called from several threads at a time."""

    def __init__(self, build: Callable[[], Sequence[EngineLike]], *, ahead: int) -> None:
        """Start the thread and build the engines in it.

        Args:
            build: makes the engines, one for each setting.
            ahead: most requests that are prepared or in the engine at a time.

        Raises:
            Exception: whatever ``build`` raises.
        """
        self._build = build
        self._inbox: queue.SimpleQueue[tuple[_Ticket, Prepared]] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(ahead)
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._engines: Sequence[EngineLike] = ()
        self._queues: list[list[tuple[_Ticket, Prepared]]] = []
        """For each engine, what it has not begun."""
        self._turn = 0
        self._waits: list[dict[str, float]] = []
        self._counters: list[dict[str, Any]] = []
        self._asked_at: float | None = None
        # when the first requests came
        self._activity = self._settled = 0
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def answer(
        self, requests: list[Asked], setting: int = 0, again: Container[int] = ()
    ) -> list[Outcome]:
        """Outcomes of the requests, in their order, an error being its own; blocks until all are
        there.

        Args:
            requests: what is asked.
            setting: number of the engine.
            again: places of requests that another setting is asked as well: what is prepared of
                them takes their place.

        Raises:
            EngineDied: the engine failed, now or earlier.
        """
        batch = _Batch(outcomes=[None] * len(requests), open=len(requests))
        if not requests:
            return []
        with self._lock:
            self._asked_at = self._asked_at or time.perf_counter()
            self._batches[id(batch)] = batch
        try:
            for index, request in enumerate(requests):
                if not self._slot():
                    break
                prepared = self._prepare(_Ticket(batch, index, setting), request)
                if prepared is not None and index in again:
                    requests[index] = prepared
            # An engine that failed before this batch was known will not end its waiting.
            if self._error is None:
                batch.done.wait()
        finally:
            with self._lock:
                del self._batches[id(batch)]
        if self._error is not None:
            raise EngineDied(f"{type(self._error).__name__}: {self._error}") from self._error
        outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
        assert len(outcomes) == len(requests), f"{len(outcomes)} outcomes of {len(requests)}"
        return outcomes

    def _slot(self) -> bool:
        """Wait for room among the requests under way; False when the engine has failed."""
        while self._error is None:
            if self._slots.acquire(timeout=1.0):
                return True
        return False

    def release(self, requests: Sequence[Asked]) -> None:
        """No setting is to read these again."""
        for prepared in requests:
            if isinstance(prepared, Prepared):
                self.engine.release(prepared)

    @property
    def engine(self) -> EngineLike:
        """The first one."""
        return self._engines[0]

    @property
    def engines(self) -> int:
        """How many there are."""
        return len(self._engines)

    @property
    def busy(self) -> bool:
        """Whether anybody waits for answers."""
        return bool(self._batches)

    @property
    def activity(self) -> int:
        """A number that grows with every step of the engine and every row that is settled."""
        return self._activity

    @property
    def settled(self) -> int:
        """Rows that have their outcome."""
        return self._settled

    def counters(self, setting: int = 0) -> dict[str, Any]:
        """An engine's counters and the thread's waiting times at its turn [s], since the start."""
        with self._lock:
            return self._counters[setting] | self._waits[setting]

    def _prepare(self, ticket: _Ticket, request: Asked) -> Prepared | None:
        """Puts a request into the inbox, prepared; None where it has its outcome already."""
        if isinstance(request, RowError):
            self._settle(ticket, request)
            return None
        try:
            prepared = request if isinstance(request, Prepared) else self.engine.prepare(request)
        except UserError as error:
            self._settle(ticket, RowError("prompt", str(error)))
        except Exception as error:  # whatever a row does to a processor is that row's own failure
            self._settle(ticket, RowError("prepare_failed", kind_and_line(error)))
        else:
            if not isinstance(prepared, Result):
                self._inbox.put((ticket, dataclasses.replace(prepared, id=ticket)))
                return prepared
            self._settle(ticket, prepared)
        return None

    def _settle(self, ticket: _Ticket, outcome: Outcome) -> None:
        batch = ticket.batch
        with self._lock:
            assert batch.outcomes[ticket.index] is None, f"row {ticket.index} answered twice"
            batch.outcomes[ticket.index] = outcome
            batch.open -= 1
            finished = batch.open == 0
            self._activity += 1
            self._settled += 1
        self._slots.release()
        if finished:
            batch.done.set()

    def _run(self) -> None:
        try:
            self._engines = self._build()
            self._queues = [[] for _ in self._engines]
            self._counters = [{} for _ in self._engines]
            self._waits = [{"preprocess_wait_s": 0.0, "idle_s": 0.0} for _ in self._engines]
            self._ready.set()
            self._loop()
        except BaseException as error:  # carried to every caller, who raises it in its own thread
            self._fail(error)
        finally:
            self._ready.set()

    def _loop(self) -> None:
        counted_at = 0.0
        while True:
            busy = self._engines[self._turn].has_work or any(self._queues)
            for ticket, prepared in self._receive(wait=not busy):
                self._queues[ticket.setting].append((ticket, prepared))
            engine = self._at_its_turn()
            queue, self._queues[self._turn] = self._queues[self._turn], []
            for ticket, prepared in queue:
                try:
                    engine.submit(prepared)
                except UserError as error:
                    self._settle(ticket, RowError("prompt", str(error)))
            results = engine.step() if engine.has_work else []
            now = time.monotonic()
            with self._lock:
                self._activity += 1
                if results or now - counted_at > COUNT_S:
                    counted_at = now
                    self._counters[self._turn] = dict(engine.stats())
            for result in results:
                self._settle(result.id, result)

    def _at_its_turn(self) -> EngineLike:
        count = len(self._engines)
        if not self._engines[self._turn].has_work:
            turns = ((self._turn + ahead) % count for ahead in range(count))
            self._turn = next((turn for turn in turns if self._queues[turn]), self._turn)
        return self._engines[self._turn]

    def _receive(self, *, wait: bool) -> list[tuple[_Ticket, Prepared]]:
        """All that is in the inbox; when ``wait``, at least one item.

        An engine that waits is idle until the first requests come, and from then on waits for
        images.
        """
        items = []
        if wait:
            began = time.perf_counter()
            items.append(self._inbox.get())
            ended = time.perf_counter()
            with self._lock:
                asked = min(max(began, self._asked_at or ended), ended)
                waits = self._waits[self._turn]
                waits["idle_s"] += asked - began
                waits["preprocess_wait_s"] += ended - asked
        while True:
            try:
                items.append(self._inbox.get_nowait())
            except queue.Empty:
                return items

    def _fail(self, error: BaseException) -> None:
        self._error = error
        with self._lock:
            batches = list(self._batches.values())
        for batch in batches:
            batch.done.set()
