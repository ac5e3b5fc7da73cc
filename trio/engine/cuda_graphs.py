"""Decode steps as CUDA graphs: one launch instead of some thousand.

A graph holds for a number of rows and for as long as the cache's table stays where it is. Rows are
rounded up, so that few graphs serve all batches; all take their memory from one pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trio.errors import first_line

_log = logging.getLogger(__name__)
PATIENCE = 256
"""Steps until recording is tried again where memory ran out; each failure doubles it."""

Step = Callable[[int], Tensor]
"""A decode step on so many rows, which reads and writes only tensors that stay in place."""
Recorded = tuple[Callable[[], object], Tensor]
"""Replays a step; what that returns, the same tensor each time."""


class Graphs(Protocol):
    """Runs decode steps."""

    trouble: str | None
    """Why steps are not recorded; None while they are."""

    def __call__(self, step: Step, rows: int, generation: int) -> Tensor:
        """What `step(rows)` returns; the next call with as many rows overwrites it.

        `generation`: steps recorded in an earlier one speak of tensors that are gone.
        """
        ...


class StepGraphs:
    """Records steps on first use, and holds none of what they belong to.

    `record`: runs a step of so many rows once and records it.
    """

    def __init__(self, record: Callable[[Step, int], Recorded] | None = None) -> None:
        self._record = record or CudaRecorder()
        self._graphs: dict[int, Recorded] = {}
        self._generation = -1
        self._too_many: int | None = None
        """So many rows and more are not recorded for now, as memory ran out."""
        self._patience = self._wait = PATIENCE
        self._is_off = False
        self.trouble: str | None = None

    def __call__(self, step: Step, rows: int, generation: int) -> Tensor:
        if generation != self._generation:
            self._graphs.clear()
            self._generation = generation
        if rows not in self._graphs and not (self._may_record(rows) and self._try(step, rows)):
            return step(rows)
        replay, out = self._graphs[rows]
        replay()
        return out

    def _may_record(self, rows: int) -> bool:
        if self._is_off:
            return False
        if self._too_many is None or rows < self._too_many:
            return True
        self._wait -= 1
        return self._wait < 0

    def _try(self, step: Step, rows: int) -> bool:
        try:
            self._graphs[rows] = self._record(step, rows)
        except RuntimeError as error:
            self._note(error, rows)
            return False
        if self._too_many is not None and rows >= self._too_many:
            self._too_many = self.trouble = None
        return True

    def _note(self, error: RuntimeError, rows: int) -> None:
        if is_out_of_memory(error):
            self._too_many = min(rows, self._too_many or rows)
            self._wait, self._patience = self._patience, 2 * self._patience
            self.trouble = (
                f"no memory for steps of {self._too_many} rows and more, tried again later; "
                "smaller ones are recorded"
            )
        else:
            self._is_off = True
            self.trouble = first_line(error)
        _log.warning("decode steps are not recorded as CUDA graphs: %s", self.trouble)


class CudaRecorder:
    """Records steps as CUDA graphs that share their memory: one is replayed at a time."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None

    def __call__(self, step: Step, rows: int) -> Recorded:
        side = self._side = self._side or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        usual = torch.cuda.current_stream()
        side.wait_stream(usual)
        try:
            with torch.cuda.stream(side):
                step(rows)  # kernels that are loaded or tuned on first use
        finally:
            usual.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the device meanwhile. Without a stream of
        # ours torch takes one that all devices share.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            out = step(rows)
        return graph.replay, out


def is_out_of_memory(error: BaseException) -> bool:
    """Also where the end of a recording that memory broke off says something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError) or "out of memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def rounded_up(count: int, most: int) -> int:
    """Rows that a step runs over for so many requests: 1, 2, 4, 8, 16, 24, ... 256, 320, ..."""
    if count <= 8:
        return min(1 << (count - 1).bit_length(), most)
    every = 8 if count <= 256 else 64
    return min(-(-count // every) * every, most)
