"""The engine's thread: order, overlap, bounds and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.job.fakes import FakeEngine
from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError
from trio.job.engines.engine_thread import Asked, EngineDied, EngineThread, Outcome
from trio.job.images.policy import RowError


def said(outcomes: list[Outcome]) -> list[str | None]:
    return [str(o) if isinstance(o, RowError) else o.response or o.error for o in outcomes]


def thread(build: Callable[[], FakeEngine] = FakeEngine, *, ahead: int = 8) -> EngineThread:
    return EngineThread(lambda: [build()], ahead=ahead)


def asked(prompts: Sequence[str]) -> list[Asked]:
    return [Request(prompt=prompt) for prompt in prompts]


def test_outcomes_come_in_the_rows_order() -> None:
    engine = thread()
    prompts = [f"p{n}" for n in range(40)]
    assert said(engine.answer(asked(prompts))) == [f"{p} []" for p in prompts]
    assert engine.settled == 40 and not engine.busy
    assert engine.answer([]) == []


def test_bad_rows_leave_their_neighbours_alone() -> None:
    class Picky(FakeEngine):
        def submit(self, prepared: Prepared) -> None:
            if len(prepared.input_ids) == 3:
                raise UserError("three tokens")
            super().submit(prepared)

    rows: list[Asked] = asked(["a", "please explode", "b" * 300, "odd", "c"])
    rows.insert(1, RowError("image_empty", "made up"))
    assert said(thread(Picky).answer(rows)) == [
        "a []",
        "image_empty: made up",
        "prepare_failed: RuntimeError: the processor broke",
        "too_long: 999 tokens",
        "prompt: three tokens",
        "c []",
    ]


def test_batches_overlap_in_the_engine() -> None:
    """A slow row of one batch does not keep another batch from finishing."""
    gate = threading.Event()

    class Gated(FakeEngine):
        def prepare(self, request: Request) -> Prepared:
            if request.prompt == "slow":
                gate.wait()
            return super().prepare(request)

    engine = thread(Gated)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.answer, asked(["slow", "a"]))
        second = pool.submit(engine.answer, asked(["b", "c"]))
        try:
            assert said(second.result(timeout=10)) == ["b []", "c []"] and not first.done()
        finally:
            gate.set()
        assert said(first.result(timeout=10)) == ["slow []", "a []"]


def test_preparation_runs_ahead_only_so_far() -> None:
    prepared = done = most = 0

    class Counting(FakeEngine):
        def prepare(self, request: Request) -> Prepared:
            nonlocal prepared
            prepared += 1
            return super().prepare(request)

        def step(self) -> list[Result]:
            nonlocal done, most
            time.sleep(0.005)
            most = max(most, prepared - done)
            results = super().step()
            done += len(results)
            return results

    thread(Counting, ahead=5).answer(asked([f"{n}" for n in range(60)]))
    assert prepared == done == 60 and 1 < most <= 5


def test_an_engine_that_dies_fails_every_batch() -> None:
    class Mortal(FakeEngine):
        def step(self) -> list[Result]:
            raise MemoryError("device is full")

    engine = thread(Mortal, ahead=2)
    with ThreadPoolExecutor(3) as pool:
        batches = [pool.submit(engine.answer, asked(["x"] * 20)) for _ in range(3)]
        for batch in batches:
            with pytest.raises(EngineDied, match="device is full"):
                batch.result(timeout=20)
    with pytest.raises(EngineDied):
        engine.answer(asked(["late"]))


def test_an_engine_that_cannot_start_says_so() -> None:
    def build() -> FakeEngine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        thread(build)


def test_an_engine_is_idle_until_it_is_asked_and_waits_for_images_from_then_on() -> None:
    began = time.monotonic()
    engine = thread()
    time.sleep(0.1)
    engine.answer(asked(["first"]))
    first = engine.counters()
    time.sleep(0.2)
    engine.answer(asked(["next"]))
    counters = engine.counters()
    assert 0.05 < first["idle_s"] == counters["idle_s"]
    assert counters["preprocess_wait_s"] - first["preprocess_wait_s"] > 0.15
    assert counters["preprocess_wait_s"] + counters["idle_s"] < time.monotonic() - began
    assert counters["prefill_s"] > 0
