"""The units of a pass as a Ray Data source: a read task for each run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from trio.job import stages
from trio.job.desk import Desk
from trio.job.stages import Run, Task


class Units(Datasource):
    """Ray calls the stage `ReadUnits`."""

    def __init__(self, runs: Sequence[Run], task: Task, desk: Desk) -> None:
        super().__init__()
        self._runs, self._told, self._desk = runs, task, desk

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
        columns, pictures = self._told.columns, self._told.pictures
        return ReadTask(partial(stages.read, run, columns, self._desk, pictures), metadata)
