"""Times parts of a device's work without synchronising in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the stretches between `running()` and its end.

    On a GPU marks are put into its stream, and only `seconds()` waits for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time of the work inside."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record(stream)
            yield
            ended.record(stream)
            self._marks.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        for began, ended in self._marks:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1e3
        self._marks.clear()
        return self._seconds
