"""The engine's thread: order, overlap, bounds and failures."""

import threading
import time
from collections.abc import Callable

import pytest

from tests.job.fakes import FakeEngine
from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError
from trio.job.images.policy import RowError
from trio.job.output.output_rows import ImageLoader
from trio.job.worker import EngineDied, EngineThread, Outcome, RowReader


def asks(prompt: str) -> RowReader:
    def read(load: ImageLoader) -> Request:
        return Request(prompt=prompt)

    return read


def fails(kind: str) -> RowReader:
    def read(load: ImageLoader) -> Request:
        raise RowError(kind, "made up")

    return read


def said(outcomes: list[Outcome]) -> list[str | None]:
    return [str(o) if isinstance(o, RowError) else o.response or o.error for o in outcomes]


def thread(build: Callable[[], FakeEngine] = FakeEngine, *, ahead: int = 8) -> EngineThread:
    return EngineThread(build, threads=3, ahead=ahead)


def test_outcomes_come_in_the_rows_order() -> None:
    engine = thread()
    prompts = [f"p{n}" for n in range(40)]
    assert said(engine.answer([asks(p) for p in prompts])) == [f"{p} []" for p in prompts]
    assert engine.answer([]) == []
    engine.close()


def test_bad_rows_leave_their_neighbours_alone() -> None:
    engine = thread()
    rows = [asks("a"), fails("image_empty"), asks("please explode"), asks("b" * 300), asks("c")]
    got = said(engine.answer(rows))
    assert got[0] == "a []" and got[4] == "c []"
    assert got[1] == "image_empty: made up"
    assert got[2] == "prepare_failed: RuntimeError: the processor broke"
    assert got[3] == "too_long: 999 tokens"
    engine.close()


def test_batches_overlap_in_the_engine() -> None:
    """A slow row of one batch does not keep another batch from finishing."""
    engine, gate, finished = thread(), threading.Event(), []

    def slow(load: ImageLoader) -> Request:
        gate.wait()
        return Request(prompt="slow")

    def batch(name: str, rows: list[RowReader]) -> None:
        finished.append((name, said(engine.answer(rows))))

    first = threading.Thread(target=batch, args=("first", [slow, asks("a")]))
    second = threading.Thread(target=batch, args=("second", [asks("b"), asks("c")]))
    first.start()
    second.start()
    second.join(10)
    assert finished == [("second", ["b []", "c []"])]
    gate.set()
    first.join(10)
    assert finished[1] == ("first", ["slow []", "a []"])
    engine.close()


def test_preparation_runs_ahead_only_so_far() -> None:
    seen: list[int] = []

    class Counting(FakeEngine):
        def prepare(self, request: Request) -> Prepared:
            seen.append(1)
            return super().prepare(request)

        def step(self) -> list[Result]:
            time.sleep(0.005)
            open_rows.append(len(seen) - done[0])
            results = super().step()
            done[0] += len(results)
            return results

    open_rows: list[int] = []
    done = [0]
    engine = thread(Counting, ahead=5)
    engine.answer([asks(f"{n}") for n in range(60)])
    engine.close()
    assert len(seen) == 60 and max(open_rows) <= 5


def test_an_engine_that_dies_fails_every_batch() -> None:
    class Mortal(FakeEngine):
        def step(self) -> list[Result]:
            raise MemoryError("device is full")

    engine, caught = thread(Mortal, ahead=2), []

    def batch() -> None:
        with pytest.raises(EngineDied, match="device is full"):
            engine.answer([asks(f"{n}") for n in range(20)])
        caught.append(1)

    threads = [threading.Thread(target=batch) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert len(caught) == 3
    with pytest.raises(EngineDied):
        engine.answer([asks("late")])


def test_an_engine_that_cannot_start_says_so() -> None:
    def build() -> FakeEngine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        thread(build)


def test_waiting_is_told_apart() -> None:
    began = time.monotonic()
    engine = thread()
    time.sleep(0.1)

    def late(load: ImageLoader) -> Request:
        time.sleep(0.2)
        return Request(prompt="late")

    engine.answer([late])
    engine.answer([asks("next")])
    counters = engine.counters()
    engine.close()
    assert counters["preprocess_wait_s"] > 0.1 and counters["idle_s"] > 0.05
    assert counters["preprocess_wait_s"] + counters["idle_s"] < time.monotonic() - began
    assert counters["prefill_s"] > 0
