"""Compactions that are killed at a step, and what must hold whenever they are.

``python -m tests.job.compactions OUT UNITS STEP`` is one in a process of its own.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.job.commits import STATS, answered, totals_of
from trio.job import storage
from trio.job.input.units import Unit
from trio.job.output import compaction
from trio.job.output.file_record import HIDDEN
from trio.job.output.sink import Sink
from trio.job.resume import committed
from trio.job.storage import Location, exists, list_files, locate

UNITS = [Unit(shard, start, start + 2) for shard in range(3) for start in range(0, 30, 2)]
SMALL = int(os.environ.get("LARGER_FILE_BYTES", "40000"))
"""Of a file of two units."""
KILLED = 17
STEPS = ("remove", "move", "remove_directory", "empty_directory")


def commit_long(out: Path | str, unit: Unit, letters: int = SMALL // 2) -> None:
    """A unit with long responses, which nothing compresses below half their size."""
    rng = random.Random(unit.start)
    rows = [row | {"response": f"{rng.getrandbits(4 * letters):x}"} for row in answered(unit)]
    sink = Sink(output=str(out), run_id="run1", id_type=pa.string())
    sink.commit(unit, rows, [STATS], [totals_of(unit)], print)


class Steps:
    """Counts the steps of compactions in this process, and ends it before one of them; 0: never."""

    def __init__(self, last: int = 0) -> None:
        self.names: list[str] = []
        self._last = last

    def take(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._last:
            os._exit(KILLED)

    def counted(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def outer(*args: Any) -> Any:
            self.take(name)
            return inner(*args)

        return outer


def compact(output: Location, units: Sequence[Unit], file_bytes: int, steps: Steps) -> None:
    """`compaction.compact`, its steps counted."""
    before = {name: getattr(storage, name) for name in STEPS}, compaction.write_record
    for name in STEPS:
        setattr(storage, name, steps.counted(name, getattr(storage, name)))
    compaction.write_record = steps.counted("record", compaction.write_record)
    try:
        compaction.compact(output, "run1", units, file_bytes, check=lambda: steps.take("check"))
    finally:
        for name, inner in before[0].items():
            setattr(storage, name, inner)
        compaction.write_record = before[1]


def killed(output: Location, units: Sequence[Unit], file_bytes: int, step: int) -> bool:
    """Whether a copy of this process came to a step, the first of which is 1, and died there."""
    child = os.fork()
    if child == 0:
        try:
            compact(output, units, file_bytes, Steps(step))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def seen(output: Location) -> list[int]:
    """Keys of the rows that a reader finds, by the order of names."""
    tables = [
        pq.read_table(info.path, filesystem=output.filesystem, columns=["row"])
        for info in list_files(output.join("rows"))
    ]
    return pa.concat_tables(tables)["row"].to_pylist() if tables else []


def check_between(output: Location, units: Sequence[Unit]) -> None:
    """At any moment: no row twice, and no unit to be done again."""
    assert not [key for key, count in Counter(seen(output)).items() if count > 1]
    assert committed.listed(output) == set(units)
    assert committed.by_setting(output, units, "run1") == (totals_of(*units),)


def check_end(output: Location, units: Sequence[Unit]) -> list[str]:
    """When all is done: every row once, in order; returns the names in ``rows/``."""
    check_between(output, units)
    assert seen(output) == [row["row"] for unit in units for row in answered(unit)]
    assert not exists(output.join(HIDDEN))
    stats = pq.read_table(output.join("stats").path, filesystem=output.filesystem)
    assert stats["unit"].to_pylist() == [unit.stem for unit in units]
    names = [info.base_name for info in list_files(output.join("rows"))]
    assert not [name for name in names if Unit.of_name(name)]
    return names


if __name__ == "__main__":
    place, count, last = sys.argv[1:]
    compact(locate(place), UNITS[: int(count)], SMALL, Steps(int(last)))
