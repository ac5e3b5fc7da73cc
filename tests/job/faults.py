"""Engines that fail as asked for in prompts, for tests of what happens then."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

from tests.job.fakes import FakeEngine
from trio.engine.request import Prepared, Request, Result
from trio.job.engine_settings import EngineFactory, EngineSettings


class FaultyEngine(FakeEngine):
    """A prompt that says `kill` ends the process while it is prepared, `crash` while the engine
    runs, `hang` keeps the engine busy for ever, `break` makes it raise. Others are answered, and
    noted in a file, line by line, when `seen` is given."""

    def __init__(self, *, delay_s: float, seen: Path | None) -> None:
        super().__init__(oldest_first=True)
        self._delay_s, self._seen = delay_s, seen
        self._fatal: list[str] = []

    def prepare(self, request: Request) -> Prepared:
        if "kill" in request.prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        self._fatal += [w for w in ("crash", "hang", "break") if w in request.prompt]
        if self._seen is not None:
            with self._seen.open("a") as stream:
                stream.write(f"{request.prompt}\n")
        return super().prepare(request)

    def step(self) -> list[Result]:
        for fault in self._fatal:
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "hang":
                time.sleep(3600)
            raise RuntimeError("CUDA error: device-side assert triggered")
        time.sleep(self._delay_s)
        return super().step()


def _build(
    settings: EngineSettings, *, delay_s: float, seen: Path | None, starts: Path | None, fail: int
) -> FaultyEngine:
    if starts is not None:
        with starts.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if len(starts.read_text().splitlines()) <= fail:
            raise RuntimeError("CUDA error: no device")
    return FaultyEngine(delay_s=delay_s, seen=seen)


def faulty(
    *, delay_s: float = 0.0, seen: Path | None = None, starts: Path | None = None, fail: int = 0
) -> EngineFactory:
    """A factory of such engines.

    Args:
        delay_s: of each step, in seconds.
        seen: file that takes the prompts as they are prepared.
        starts: file that takes a line with the process's number for each start.
        fail: so many starts fail first.
    """
    return partial(_build, delay_s=delay_s, seen=seen, starts=starts, fail=fail)
