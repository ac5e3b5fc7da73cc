"""Decode steps as CUDA graphs: one launch instead of some thousand.

A graph holds for a number of rows and for as long as keys and values stay where they are. Rows are
rounded up to a power of two, so that few graphs serve all batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from trio.errors import first_line

_log = logging.getLogger(__name__)


class StepGraphs:
    """Runs a step of a fixed number of rows, captured on first use.

    `forward`: the step on so many rows, reading and writing only tensors that stay in place.
    """

    def __init__(self, forward: Callable[[int], Tensor]) -> None:
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._generation = -1
        self._side: torch.cuda.Stream | None = None
        self.trouble: str | None = None
        """Why graphs were given up; None while they are used."""

    def __call__(self, rows: int, generation: int) -> Tensor:
        """What `forward(rows)` returns; the next call with as many rows overwrites it.

        `generation`: graphs of an earlier one speak of tensors that are gone.
        """
        if self.trouble is not None:
            return self._forward(rows)
        if generation != self._generation:
            self._graphs.clear()
            self._generation = generation
        if rows not in self._graphs:
            try:
                self._graphs[rows] = self._capture(rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.trouble = first_line(error)
                _log.warning("decoding goes on without CUDA graphs: %s", self.trouble)
                return self._forward(rows)
        graph, out = self._graphs[rows]
        graph.replay()
        return out

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = self._side = self._side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(rows)  # kernels that are loaded or tuned on first use
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self._forward(rows)
        return graph, out


def rounded_up(count: int, most: int) -> int:
    """Rows that a step runs over for so many requests."""
    return min(1 << (count - 1).bit_length(), most)
