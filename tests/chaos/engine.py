"""The stand-ins of the chaos tests for engine and preprocessor: slow, and with rows that kill, hang
or eat memory.

It leaves two kinds of files below a directory of the test's, which outlive its process: who ran an
engine and where, and each answer it gave. The second tells how much work was done more than once.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from PIL import Image

from tests.job.fakes import FakeEngine
from trio.engine.request import Result
from trio.errors import UserError
from trio.job.engines.engine_settings import EngineSettings

POISON = "poison"
# a prompt that begins so kills the process that answers it, each time
HANG_ONCE, EAT_ONCE = "hang once", "eat once"
# the first step with such a prompt never ends, or takes memory until somebody ends it
EAT_BYTES = 6 << 30
UNLUCKY = "unlucky"
# kills the process that answers it twice, hangs twice, and is answered at the fifth try
ENGINES, ANSWERS, ONCE, HANGS = "engines", "answers", "once", "hangs"
KILLS, SLEEPS, BLOCKS = 255, 254, 253
# blue of images at which the preprocessor kills its process, sleeps, or blocks it for ever


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the stand-in does; travels from the driver to the actors."""

    side: str
    # directory for what it leaves
    delay_s: float = 0.15
    # of a step, which ends up to `width` rows
    width: int = 4
    reverse: bool = False
    # late rows first
    start: str = ""
    # "raise", "exit" or "user": how it fails to start
    image_s: float = 0.0
    # that an image takes to be preprocessed


def build(options: Options, settings: EngineSettings) -> list[ChaosEngine]:
    """The factory of engines, with its options bound."""
    _leave(options, ENGINES, _process())
    if options.start == "raise":
        raise RuntimeError("no weights on this node")
    if options.start == "user":
        raise UserError("--model demo: not for this test")
    if options.start == "exit":
        os._exit(9)
    return [ChaosEngine(options) for _ in settings.engines]


class ChaosEngine(FakeEngine):
    """Answers as ``FakeEngine`` does, in the order asked for."""

    def __init__(self, options: Options) -> None:
        super().__init__(width=options.width, oldest_first=not options.reverse)
        self._options = options
        path = Path(options.side, ANSWERS, f"{os.getpid()}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answers = path.open("a")

    def step(self) -> list[Result]:
        time.sleep(self._options.delay_s)
        for _, said in self._running[self._next]:
            self._suffer(said)
        results = super().step()
        for result in results:
            self._answers.write(f"{result.response}\n")
        self._answers.flush()
        return results

    def _suffer(self, said: str) -> None:
        if said.startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        elif said.startswith(HANG_ONCE) and self._first(HANG_ONCE):
            time.sleep(3600)
        elif said.startswith(EAT_ONCE) and self._first(EAT_ONCE):
            held = []
            for _ in range(EAT_BYTES >> 26):
                held.append(bytearray(b"\1") * (1 << 26))
                time.sleep(0.02)
            time.sleep(30)  # for the monitor, which looks now and then
        elif said.startswith(UNLUCKY):
            tried = next(n for n in range(1, 6) if self._first(f"{UNLUCKY} {n}"))
            if tried <= 2:
                os.kill(os.getpid(), signal.SIGKILL)
            elif tried <= 4:
                _leave(self._options, HANGS, _process())
                time.sleep(3600)

    def _first(self, name: str) -> bool:
        """Whether no engine of this test has come here before."""
        path = Path(self._options.side, ONCE, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class ChaosPreprocessor:
    """Hands decoded images on as they are."""

    options: Options
    cut = True
    # as the model's where it can be stopped at uint8 pixels

    def process(self, images: Sequence[Image.Image]) -> Sequence[Image.Image]:
        for image in images:
            blue = image.tobytes()[2]
            if blue == KILLS:
                os.kill(os.getpid(), signal.SIGKILL)
            elif blue == SLEEPS:
                time.sleep(3600)
            elif blue == BLOCKS:  # as a decoder in C does that never returns
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                ctypes.PyDLL(None).sleep(3600)
            time.sleep(self.options.image_s)
        return images


def build_preprocessor(options: Options, settings: EngineSettings) -> ChaosPreprocessor:
    """The factory of engines, with its options bound."""
    return ChaosPreprocessor(options)


def _process() -> dict[str, object]:
    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


def _leave(options: Options, kind: str, content: dict[str, object]) -> None:
    path = Path(options.side, kind, f"{time.time_ns()}-{os.getpid()}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(json.dumps(content))
    hidden.rename(path)
