"""Commit of a unit: its statistics, then its rows, under names that follow from the plan.

The rows file is the commit point. A unit that is done again overwrites both files, so neither a
retry nor a crash between the two writes can double or lose a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import JobFailed, kind_and_line
from trio.job.input.units import Unit
from trio.job.output.schema import build_table, check_keys, rows_schema, stats_schema
from trio.job.output.totals import Totals
from trio.job.storage import open_location, write_atomic

ROWS, STATS = "rows", "stats"
WRITE_TRIES = 5
PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
"""One row is read in half the time so, and takes less room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """Where units go and in which columns; travels to the actors."""

    output: str
    """Directory or URI."""
    run_id: str
    id_type: pa.DataType
    save_kept: bool

    def commit(
        self,
        unit: Unit,
        rows: Sequence[Mapping[str, Any]],
        stats: Mapping[str, Any],
        totals: Totals,
    ) -> None:
        """Write a unit; when this returns, its rows are there for good.

        Args:
            unit: whose rows these are.
            rows: all of them, in order.
            stats: columns of ``stats/`` that are no sums: who did it, when, peaks and limits.
            totals: of the rows, and what they took.
        """
        check_keys(rows, unit.shard, unit.start, unit.stop)
        assert totals.rows == len(rows), f"totals of {totals.rows} rows, not of {len(rows)}"
        sums = {"unit": unit.stem} | totals.to_stats()
        assert not sums.keys() & stats, f"given twice: {sorted(sums.keys() & stats)}"
        schema = rows_schema(self.id_type, run_id=self.run_id, save_kept=self.save_kept)
        table = build_table(rows, schema)
        figures = build_table([{**sums, **stats}], stats_schema(run_id=self.run_id))
        out = open_location(self.output)
        write_atomic(out.join(STATS, unit.name), serialise(figures, **PLAIN))
        write_atomic(out.join(ROWS, unit.name), serialise(table))

    def persist(
        self,
        unit: Unit,
        rows: Sequence[Mapping[str, Any]],
        stats: Mapping[str, Any],
        totals: Totals,
        pause_s: Callable[[int], float],
        tell: Callable[[str], None],
    ) -> None:
        """`commit`, tried again where the storage fails.

        Args:
            unit, rows, stats, totals: as of `commit`.
            pause_s: seconds before the next try, by the number of failures.
            tell: takes a line for each failure but the last.

        Raises:
            JobFailed: the last try failed, too.
        """
        for tried in range(1, WRITE_TRIES + 1):
            try:
                return self.commit(unit, rows, stats, totals)
            except OSError as error:
                said = kind_and_line(error, 300)
                reason = f"rows/{unit.name} failed {tried} times: {said}"
                if tried == WRITE_TRIES:
                    raise JobFailed(reason) from error
                tell(reason)
                time.sleep(pause_s(tried))


def serialise(table: pa.Table, **options: Any) -> pa.Buffer:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    return sink.getvalue()
