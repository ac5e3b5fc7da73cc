"""Commit of a unit: its statistics, then its rows, under names that follow from the plan.

The rows file is the commit point. A unit that is done again overwrites both files, so neither a
retry nor a crash between the two writes can double or lose a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.job.input.units import Unit
from trio.job.output.schema import RECEIPT_KEY, build_table, check_keys, rows_schema, stats_schema
from trio.job.output.totals import Totals
from trio.job.storage import open_location, write_atomic

ROWS, STATS = "rows", "stats"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """Where units go and in which columns; travels to the actors."""

    output: str
    # directory or URI
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
        """Write a unit; when this returns, its rows are there for good."""
        check_keys(rows, unit.shard, unit.start, unit.stop)
        receipt = {RECEIPT_KEY: totals.to_json().encode()}
        schema = rows_schema(self.id_type, run_id=self.run_id, save_kept=self.save_kept)
        table = build_table(rows, schema)
        out = open_location(self.output)
        figures = build_table([stats], stats_schema(run_id=self.run_id))
        write_atomic(out.join(STATS, unit.name), serialise(figures))
        marked = table.replace_schema_metadata({**schema.metadata, **receipt})
        write_atomic(out.join(ROWS, unit.name), serialise(marked))


def serialise(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
