"""An engine in a thread of its own, fed by threads that decode and prepare. No Ray in here.

INPUT batches of rows from any number of calling threads; OUTPUT each batch's outcomes in its own
order, one for each row. Rows of all batches share the engine, so a slow row delays only its own
batch; how far preparation runs ahead of the engine is bounded. Each preparing thread has a process
for images, so that none of them can hang or kill the engine.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from trio.engine.kv_budget import MemoryPlan
from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError, first_line
from trio.job.image_process import ImageProcess, NoImageProcess
from trio.job.images.policy import RowError
from trio.job.output.output_rows import ImageLoader

Outcome = Result | RowError
RowReader = Callable[[ImageLoader], Request]
# reads one row with the loader that it is given; raises RowError when it cannot be asked


class EngineLike(Protocol):
    """What the job needs of ``trio.Engine``."""

    @property
    def has_work(self) -> bool: ...
    @property
    def memory_plan(self) -> MemoryPlan: ...
    def prepare(self, request: Request) -> Prepared | Result: ...
    def submit(self, prepared: Prepared) -> None: ...
    def step(self) -> list[Result]: ...
    def stats(self) -> Mapping[str, Any]: ...


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

    def __init__(self, build: Callable[[], EngineLike], *, threads: int, ahead: int) -> None:
        """Start the thread and build the engine in it.

        Args:
            build: makes the engine.
            threads: threads that decode and prepare rows.
            ahead: most rows that are prepared or in the engine at a time.

        Raises:
            Exception: whatever ``build`` raises.
        """
        self._build = build
        self._inbox: queue.SimpleQueue[tuple[_Ticket, Prepared] | None] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(ahead)
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._waits = {"preprocess_wait_s": 0.0, "idle_s": 0.0}
        self._asked_at = time.perf_counter()
        # when rows were first there after none had been
        self._counters: dict[str, Any] = {}
        self._activity = 0
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        self._own = threading.local()
        self._images: list[ImageProcess] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        together = threading.Barrier(threads)
        warm = [self._pool.submit(self._warm, together) for _ in range(threads)]
        self._ready.wait()
        wait(warm)
        if self._error is not None:
            raise self._error

    def answer(self, rows: Sequence[RowReader]) -> list[Outcome]:
        """Outcomes of the rows, in their order; blocks until all are there.

        Raises:
            EngineDied: the engine failed, now or earlier.
        """
        batch = _Batch(outcomes=[None] * len(rows), open=len(rows))
        if not rows:
            return []
        with self._lock:
            if not self._batches:
                self._asked_at = time.perf_counter()
            self._batches[id(batch)] = batch
        try:
            for index, row in enumerate(rows):
                if not self._slot():
                    break
                self._pool.submit(self._prepare, _Ticket(batch, index), row)
            # An engine that failed before this batch was known will not end its waiting.
            if self._error is None:
                batch.done.wait()
        finally:
            with self._lock:
                del self._batches[id(batch)]
        if self._error is not None:
            raise EngineDied(f"the engine failed: {self._error!r}") from self._error
        outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
        assert len(outcomes) == len(rows), f"{len(outcomes)} outcomes for {len(rows)} rows"
        return outcomes

    def _slot(self) -> bool:
        """Wait for room among the rows under way; False when the engine has failed."""
        while self._error is None:
            if self._slots.acquire(timeout=1.0):
                return True
        return False

    @property
    def memory_plan(self) -> MemoryPlan:
        return self._engine.memory_plan

    @property
    def activity(self) -> int:
        """A number that grows with every step of the engine and every row that is settled."""
        return self._activity

    def counters(self) -> dict[str, Any]:
        """The engine's counters and the thread's waiting times [s], since the start."""
        with self._lock:
            return self._counters | self._waits

    def close(self) -> None:
        """Stop the threads and their processes once the engine is through with what it has."""
        self._inbox.put(None)
        self._thread.join()
        self._pool.shutdown()
        for process in self._images:
            process.close()

    def _loader(self) -> ImageProcess:
        """The calling thread's own."""
        if not hasattr(self._own, "images"):
            self._own.images = ImageProcess()
            with self._lock:
                self._images.append(self._own.images)
        loader: ImageProcess = self._own.images
        return loader

    def _warm(self, together: threading.Barrier) -> None:
        """Start a thread's process while the engine is built; none that fails is missed yet."""
        together.wait()
        with suppress(NoImageProcess):
            self._loader().start()

    def _prepare(self, ticket: _Ticket, row: RowReader) -> None:
        try:
            prepared = self._engine.prepare(row(self._loader()))
        except RowError as error:
            self._settle(ticket, error)
        except NoImageProcess as error:
            self._fail(error)
        except UserError as error:
            self._settle(ticket, RowError("prompt", str(error)))
        except Exception as error:  # whatever a row does to a processor is that row's own failure
            self._settle(
                ticket, RowError("prepare_failed", f"{type(error).__name__}: {first_line(error)}")
            )
        else:
            if isinstance(prepared, Result):
                self._settle(ticket, prepared)
            else:
                self._inbox.put((ticket, _with_id(prepared, ticket)))

    def _settle(self, ticket: _Ticket, outcome: Outcome) -> None:
        batch = ticket.batch
        with self._lock:
            assert batch.outcomes[ticket.index] is None, f"row {ticket.index} answered twice"
            batch.outcomes[ticket.index] = outcome
            batch.open -= 1
            finished = batch.open == 0
            self._activity += 1
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
        closing = False
        while not (closing and not engine.has_work):
            for item in self._receive(wait=not engine.has_work and not closing):
                if item is None:
                    closing = True
                else:
                    self._submit(engine, *item)
            results = engine.step() if engine.has_work else []
            with self._lock:
                self._activity += 1
            if results:
                with self._lock:
                    self._counters = dict(engine.stats())
            for result in results:
                self._settle(result.id, result)

    def _submit(self, engine: EngineLike, ticket: _Ticket, prepared: Prepared) -> None:
        try:
            engine.submit(prepared)
        except UserError as error:
            self._settle(ticket, RowError("prompt", str(error)))

    def _receive(self, *, wait: bool) -> list[tuple[_Ticket, Prepared] | None]:
        """All that is in the inbox; when ``wait``, at least one item."""
        items = []
        if wait:
            began = time.perf_counter()
            items.append(self._inbox.get())
            ended = time.perf_counter()
            with self._lock:
                asked = min(max(began, self._asked_at), ended)
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


def _with_id(prepared: Prepared, ticket: _Ticket) -> Prepared:
    return dataclasses.replace(prepared, id=ticket)
