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


class Sharing(FakeEngine):
    """Says its name before the prompt; takes what another one prepared, and sees whether any of
    the others has work while it works itself."""

    def __init__(self, name: str, others: list[Sharing]) -> None:
        super().__init__(width=2)
        self.name, self.others = name, others
        self.prepared: list[str] = []
        self.released: list[str] = []
        self.together = 0
        others.append(self)

    def prepare(self, request: Request) -> Prepared:
        self.prepared.append(request.prompt)
        super().prepare(request)
        return Prepared(input_ids=(1, 2), prompt=request.prompt)

    def submit(self, prepared: Prepared) -> None:
        if self.name in prepared.prompt:
            raise UserError(f"not with {self.name}")
        self._look()
        self._running.append((prepared, f"{self.name}: {prepared.prompt}"))

    def step(self) -> list[Result]:
        self._look()
        return super().step()

    def release(self, prepared: Prepared) -> None:
        self.released.append(prepared.prompt)

    def _look(self) -> None:
        self.together += sum(other.has_work for other in self.others if other is not self)


def several(count: int, *, ahead: int = 8) -> tuple[EngineThread, list[Sharing]]:
    engines: list[Sharing] = []
    names = "abc"[:count]
    return EngineThread(lambda: [Sharing(name, engines) for name in names], ahead=ahead), engines


def test_each_setting_answers_what_was_prepared_once() -> None:
    engine, engines = several(3)
    rows: list[Asked] = asked([f"{n}" for n in range(20)])
    for setting, name in enumerate("abc"):
        assert said(engine.answer(rows, setting, range(20))) == [f"{name}: {n}" for n in range(20)]
        assert all(isinstance(row, Prepared) for row in rows)
    assert [one.prepared for one in engines] == [[f"{n}" for n in range(20)], [], []]
    assert engine.settled == 60 and not engine.busy


def test_what_is_not_asked_again_is_left_as_it_is() -> None:
    engine, (only,) = several(1)
    rows = asked(["x", "y"])
    first, second = rows
    for _ in range(2):
        engine.answer(rows, 0, {1})
    assert rows[0] is first and rows[1] is not second
    assert only.prepared == ["x", "y", "x"]


def test_settings_take_turns() -> None:
    """Whoever asks: an engine begins only when the one before has nothing left."""
    engine, engines = several(3, ahead=6)

    def ask(number: int) -> list[list[str | None]]:
        rows: list[Asked] = asked([f"{number}.{n}" for n in range(15)])
        return [said(engine.answer(rows, (setting + number) % 3)) for setting in range(3)]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    for number, of_settings in enumerate(found):
        for setting, answers in enumerate(of_settings):
            name = "abc"[(setting + number) % 3]
            assert answers == [f"{name}: {number}.{n}" for n in range(15)]
    assert [one.together for one in engines] == [0, 0, 0]


def test_an_engine_waits_for_the_one_before() -> None:
    began, gate = threading.Event(), threading.Event()

    class Gated(Sharing):
        def step(self) -> list[Result]:
            if self.name == "a":
                began.set()
                gate.wait(10)
            return super().step()

    engines: list[Sharing] = []
    engine = EngineThread(lambda: [Gated(name, engines) for name in "ab"], ahead=8)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.answer, asked(["1", "2", "3"]), 0)
        assert began.wait(10)
        second = pool.submit(engine.answer, asked(["4"]), 1)
        time.sleep(0.2)
        assert not engines[1].has_work and not second.done()
        gate.set()
        assert said(first.result(timeout=10)) == ["a: 1", "a: 2", "a: 3"]
        assert said(second.result(timeout=10)) == ["b: 4"]


def test_each_setting_has_its_own_outcome() -> None:
    """What one refuses another may answer; what cannot be prepared no setting has."""
    engine, _ = several(2)
    rows: list[Asked] = asked(["1", "all", "explode", "bee"])
    rows.append(RowError("image_empty", "made up"))
    broke = "prepare_failed: RuntimeError: the processor broke"
    empty = "image_empty: made up"
    assert said(engine.answer(rows, 0)) == ["a: 1", "prompt: not with a", broke, "a: bee", empty]
    assert said(engine.answer(rows, 1)) == ["b: 1", "b: all", broke, "prompt: not with b", empty]


def test_what_was_prepared_is_released() -> None:
    engine, engines = several(2)
    rows: list[Asked] = asked(["1", "2", "explode"])
    rows.append(RowError("image_empty", "made up"))
    for setting in range(2):
        engine.answer(rows, setting, range(4))
    assert engines[0].released == engines[1].released == []
    engine.release(rows)
    assert engines[0].released + engines[1].released == ["1", "2"]


def test_each_setting_has_its_own_counters() -> None:
    engine, _ = several(2)
    rows: list[Asked] = asked([f"{n}" for n in range(6)])
    engine.answer(rows, 0)
    first = engine.counters(0)
    assert first["prefill_s"] > 0 and "prefill_s" not in engine.counters(1)
    time.sleep(0.1)
    engine.answer(rows[:2], 1)
    assert 0 < engine.counters(1)["prefill_s"] < first["prefill_s"]
    assert engine.counters(0)["prefill_s"] == first["prefill_s"]


def test_an_engine_that_dies_takes_the_others_with_it() -> None:
    class Mortal(Sharing):
        def step(self) -> list[Result]:
            if self.name == "b":
                raise MemoryError("device is full")
            return super().step()

    engines: list[Sharing] = []
    engine = EngineThread(lambda: [Mortal(name, engines) for name in "ab"], ahead=8)
    rows: list[Asked] = asked(["1"])
    assert said(engine.answer(rows, 0)) == ["a: 1"]
    for setting in (1, 0):
        with pytest.raises(EngineDied, match="device is full"):
            engine.answer(rows, setting)
