"""An engine in a thread of its own, fed by the threads that ask it. No Ray in here.

INPUT batches of requests from any number of calling threads; OUTPUT each batch's outcomes in its
own order, one for each request. Requests of all batches share the engine, so a slow one delays only
its own batch; how far preparation runs ahead of the engine is bounded.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError, kind_and_line
from trio.job.engines.engine_settings import EngineLike
from trio.job.images.policy import RowError

Outcome = Result | RowError


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


class EngineThread:
    """Owner of an engine; ``answer`` may be called from several threads at a time."""

    def __init__(self, build: Callable[[], EngineLike], *, ahead: int) -> None:
        """Start the thread and build the engine in it.

        Args:
            build: makes the engine.
            ahead: most requests that are prepared or in the engine at a time.

        Raises:
            Exception: whatever ``build`` raises.
        """
        self._build = build
        self._inbox: queue.SimpleQueue[tuple[_Ticket, Prepared]] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(ahead)
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._waits = {"preprocess_wait_s": 0.0, "idle_s": 0.0}
        self._counters: dict[str, Any] = {}
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

    def answer(self, requests: Sequence[Request | RowError]) -> list[Outcome]:
        """Outcomes of the requests, in their order, an error being its own; blocks until all are
        there.

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
                self._prepare(_Ticket(batch, index), request)
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

    @property
    def engine(self) -> EngineLike:
        return self._engine

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

    def counters(self) -> dict[str, Any]:
        """The engine's counters and the thread's waiting times [s], since the start."""
        with self._lock:
            return self._counters | self._waits

    def _prepare(self, ticket: _Ticket, request: Request | RowError) -> None:
        if isinstance(request, RowError):
            self._settle(ticket, request)
            return
        try:
            prepared = self._engine.prepare(request)
        except UserError as error:
            self._settle(ticket, RowError("prompt", str(error)))
        except Exception as error:  # whatever a row does to a processor is that row's own failure
            self._settle(ticket, RowError("prepare_failed", kind_and_line(error)))
        else:
            if isinstance(prepared, Result):
                self._settle(ticket, prepared)
            else:
                self._inbox.put((ticket, dataclasses.replace(prepared, id=ticket)))

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
            self._engine = self._build()
            self._ready.set()
            self._loop(self._engine)
        except BaseException as error:  # carried to every caller, who raises it in its own thread
            self._fail(error)
        finally:
            self._ready.set()

    def _loop(self, engine: EngineLike) -> None:
        while True:
            for ticket, prepared in self._receive(wait=not engine.has_work):
                try:
                    engine.submit(prepared)
                except UserError as error:
                    self._settle(ticket, RowError("prompt", str(error)))
            results = engine.step() if engine.has_work else []
            with self._lock:
                self._activity += 1
                if results:
                    self._counters = dict(engine.stats())
            for result in results:
                self._settle(result.id, result)

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
                self._waits["idle_s"] += asked - began
                self._waits["preprocess_wait_s"] += ended - asked
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
