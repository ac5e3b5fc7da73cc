"""The units of a pass as a Ray Data source: a read task for each run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from trio.job import stages
from trio.job.desk import Desk
from trio.job.input.columns import Columns
from trio.job.stages import Run


class Units(Datasource):
    """Ray calls the stage `ReadUnits`."""

    def __init__(self, runs: Sequence[Run], columns: Columns, desk: Desk) -> None:
        super().__init__()
        self._runs, self._columns, self._desk = runs, columns, desk

    def get_name(self) -> str:
        return "Units"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        return [self._task(run) for run in self._runs]

    def _task(self, run: Run) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=len(run.units), size_bytes=None, exec_stats=None, input_files=None
        )
        return ReadTask(partial(stages.read, run, self._columns, self._desk), metadata)
