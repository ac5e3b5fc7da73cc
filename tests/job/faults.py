"""Stages that fail as asked for in a row, for tests of what happens then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.job.fakes import FakeEngine
from trio.engine.request import Prepared, Request, Result
from trio.job import stages
from trio.job.desk import Desk
from trio.job.engines.engine_settings import EngineFactory, EngineSettings
from trio.job.input.columns import Columns
from trio.job.input.joined_pictures import PictureFiles
from trio.job.passes import Pass, Work
from trio.job.stages import Block, Receipt, Run

BAD_COLOUR = (255, 1, 2)
"""Of images that kill the process which prepares them."""


class FaultyEngine(FakeEngine):
    """A prompt that says `kill` ends the process while it is prepared, `crash` while the engine
    runs, `hang` keeps the engine busy for ever, `break` makes it raise. Others are answered, and
    noted in a file, line by line, when `seen` is given."""

    def __init__(self, *, delay_s: float, seen: Path | None, odd_counters: bool) -> None:
        super().__init__(oldest_first=True)
        self._odd_counters = odd_counters
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

    def stats(self) -> Mapping[str, Any]:
        return {"encode_s": "odd"} if self._odd_counters else super().stats()


def _build(
    settings: EngineSettings,
    *,
    delay_s: float,
    seen: Path | None,
    starts: Path | None,
    fail: int,
    odd_counters: bool,
) -> list[FaultyEngine]:
    if starts is not None:
        with starts.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if len(starts.read_text().splitlines()) <= fail:
            raise RuntimeError("CUDA error: no device")
    made = partial(FaultyEngine, delay_s=delay_s, seen=seen, odd_counters=odd_counters)
    return [made() for _ in settings.engines]


def faulty(
    *,
    delay_s: float = 0.0,
    seen: Path | None = None,
    starts: Path | None = None,
    fail: int = 0,
    odd_counters: bool = False,
) -> EngineFactory:
    """A factory of such engines.

    Args:
        delay_s: of each step, in seconds.
        seen: file that takes the prompts as they are prepared.
        starts: file that takes a line with the process's number for each start.
        fail: so many starts fail first.
        odd_counters: they are no numbers.
    """
    return partial(
        _build, delay_s=delay_s, seen=seen, starts=starts, fail=fail, odd_counters=odd_counters
    )


class DeadlyPreprocessor:
    """Hands on decoded images as they are, unless one is of BAD_COLOUR."""

    cut = True

    def __init__(self, *, odd: bool) -> None:
        self._odd = odd

    def process(self, images: Sequence[Any]) -> list[Any]:
        if any(image.getpixel((0, 0)) == BAD_COLOUR for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return [object()] if self._odd else list(images)


def deadly(settings: EngineSettings, *, odd: bool = False, fail: bool = False) -> Any:
    """A preprocessor's factory.

    Args:
        settings: not looked at.
        odd: what it makes of images is nothing that stages know.
        fail: there is none.
    """
    if fail:
        raise RuntimeError("no processor")
    return DeadlyPreprocessor(odd=odd)


def _deadly_read(
    run: Run, columns: Columns, desk: Desk, pictures: PictureFiles | None = None
) -> Iterator[pa.Table]:
    for row in _read(run, columns, desk, pictures):
        if "doom" in Block.unpack(row).table.column("prompt").to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        yield row


_read = stages.read


class DeadlyReader(Pass):
    """A pass whose readers are killed by a prompt `doom`."""

    def run(self, work: Work) -> Iterator[list[Receipt]]:
        stages.read = _deadly_read
        yield from super().run(work)
