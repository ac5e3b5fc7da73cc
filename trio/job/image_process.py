"""A process that fetches and decodes for one thread, and what becomes of a row that kills it.

INPUT an image cell, as ``images.load_images`` takes it; OUTPUT the same images or error. A row that
hangs or crashes a decoder costs that process, not the engine beside it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from PIL import Image

from trio.job import frames
from trio.job.environment import PACKAGE
from trio.job.images.image_files import NOTE, Buffer, parts_of
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.storage import Location

MODULE = "trio.job.image_worker"
START_S = 120.0
# for a process to load its libraries from a slow disk
GRACE_S = 5.0
# beyond the row's limit, in which the process's own alarm should have ended it
END_S = 2.0
# for a process to go, before it is killed, and after
ATTEMPTS = 2
BUFFER_BYTES = 1 << 16
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031
_MOST_BUFFERS = 512
# in one writev; systems allow 1024


class NoImageProcess(RuntimeError):
    """Processes for images do not start here: no row is at fault."""


class _Ended(Exception):
    """The process closed its end of a pipe."""


class _Overdue(Exception):
    """The process did not answer in time."""


class _Died(Exception):
    def __init__(self, reason: str, *, timed_out: bool) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class ImageProcess:
    """``load_images`` in a process of its own, started when first needed; for one thread."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._sent: ImagePolicy | None = None
        # what the present process knows

    def __call__(self, value: Any, base: Location | None, policy: ImagePolicy) -> list[Image.Image]:
        """Images of one cell; ``base`` is the directory of the row's shard.

        Raises:
            RowError: as ``load_images``, and where the row took too long or killed two processes.
            NoImageProcess: none can be started.
        """
        parts = parts_of(value)
        header = {
            "names": [part if isinstance(part, str) else None for part in parts],
            "base": base.uri if base else None,
        }
        buffers = [part for part in parts if not isinstance(part, str)]
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(header, buffers, policy)
            except _Died as death:
                reason = str(death)
                if death.timed_out:
                    raise RowError(
                        "image_timeout",
                        f"fetching and decoding took more than {policy.row_timeout:g} s"
                        " (--row-timeout)",
                    ) from death
        raise RowError(
            "image_crashed", f"the process that decodes it died {ATTEMPTS} times{reason}"
        )

    def start(self) -> None:
        """Start the process, so that the first row need not wait for it.

        Raises:
            NoImageProcess: none can be started.
        """
        self._started()

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.end(patience=END_S)

    def _ask(
        self, header: dict[str, Any], buffers: Sequence[Buffer], policy: ImagePolicy
    ) -> list[Image.Image]:
        child = self._started()
        if policy is not self._sent:
            header = header | {"policy": asdict(policy)}
        began = time.monotonic()
        deadline = began + policy.row_timeout + GRACE_S
        try:
            child.send([frames.pack(header, list(map(len, buffers))), *buffers], deadline)
            answer = child.header(deadline)
            self._sent = policy
            pixels = [child.receive(size, deadline) for size in answer[frames.SIZES]]
        except (_Ended, _Overdue) as fault:
            self._child = None
            late = time.monotonic() - began >= policy.row_timeout
            status = child.end(patience=END_S if isinstance(fault, _Ended) else 0.0)
            raise _Died(_cause(status), timed_out=late or status == -signal.SIGALRM) from fault
        except Exception:  # the rest of its answer would be taken for the next row's
            self._child = None
            child.end(patience=0.0)
            raise
        if "error" in answer:
            raise RowError(*answer["error"])
        return [
            _image(size, data, note)
            for size, data, note in zip(answer["images"], pixels, answer["notes"], strict=True)
        ]

    def _started(self) -> _Child:
        """The process, a new one where there is none."""
        if self._child is not None:
            return self._child
        fault = ""
        for _ in range(ATTEMPTS):
            try:
                child = _Child(_start())
            except OSError as error:
                fault = str(error)
                continue
            try:
                child.header(time.monotonic() + START_S)
            except (_Ended, _Overdue) as error:
                late = isinstance(error, _Overdue)
                status = child.end(patience=0.0 if late else END_S)
                fault = "it is too slow" if late else f"it ended{_cause(status)}"
                continue
            self._child, self._sent = child, None
            return child
        raise NoImageProcess(f"no process for images can be started: {fault}")


def _image(size: list[int], pixels: bytearray, note: str | None) -> Image.Image:
    image = Image.frombuffer("RGB", (size[0], size[1]), pixels, "raw", "RGB", 0, 1)
    if note:
        image.info[NOTE] = note
    return image


def _start() -> subprocess.Popen[bytes]:
    """A process with our modules: not the working directory's, not the async library's."""
    others = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
    ours = str(PACKAGE.parent)
    path = os.pathsep.join([ours, *(each for each in others if each != ours)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


class _Child:
    """A process and its pipes, on which nothing waits beyond a deadline."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process = process
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        # a small answer comes with one read: each call that waits may cost a turn at the GIL
        self._start = self._stop = 0
        for pipe in (self._in, self._out):
            os.set_blocking(pipe, False)
            if sys.platform == "linux":
                with suppress(OSError):  # a user's pipes together may have so much and no more
                    fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BYTES)

    def send(self, buffers: Sequence[Buffer], deadline: float) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while views:
            try:
                count = os.writev(self._in, views[:_MOST_BUFFERS])
            except BlockingIOError:
                _wait(self._in, select.POLLOUT, deadline)
                continue
            except BrokenPipeError as error:
                raise _Ended from error
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def header(self, deadline: float) -> dict[str, Any]:
        (length,) = frames.PREFIX.unpack(self.receive(frames.PREFIX.size, deadline))
        return frames.parse(self.receive(length, deadline))

    def receive(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            if self._start == self._stop and len(left) >= BUFFER_BYTES:
                left = left[self._read(left, deadline) :]
                continue
            if self._start == self._stop:
                self._start, self._stop = 0, self._read(self._buffer, deadline)
            count = min(len(left), self._stop - self._start)
            left[:count] = self._buffer[self._start : self._start + count]
            self._start += count
            left = left[count:]
        return data

    def _read(self, view: memoryview, deadline: float) -> int:
        _wait(self._out, select.POLLIN, deadline)
        count = os.readv(self._out, [view])
        if count == 0:
            raise _Ended
        return count

    def end(self, *, patience: float) -> int | None:
        """Its exit status; None where not even SIGKILL ends it, and it is left to itself."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        for _ in range(2):
            try:
                return self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                patience = END_S
        return None


def _wait(pipe: int, event: int, deadline: float) -> None:
    left = deadline - time.monotonic()
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, left) * 1000):
        raise _Overdue


def _cause(status: int | None) -> str:
    if status is None:
        return ""
    if status >= 0:
        return f", with exit code {status}"
    try:
        return f", of {signal.Signals(-status).name}"
    except ValueError:
        return f", of signal {-status}"
