"""Commit of a unit: its statistics, what a page shows of it, then its rows, under names that follow
from the plan.

The rows file is the commit point. A unit that is done again overwrites all of them, so neither a
retry nor a crash between the writes can double or lose a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import JobFailed, kind_and_line
from trio.job.input.units import Unit
from trio.job.output.gallery import GALLERY, Sample, gallery_table
from trio.job.output.schema import (
    build_table,
    check_rows,
    rows_schema,
    split_key,
    stats_schema,
)
from trio.job.output.totals import Totals, merge
from trio.job.storage import Location, exists, open_location, remove, write_atomic

ROWS, STATS = "rows", "stats"
THUMBNAIL_BYTES = 64 << 20
"""Of a gallery file that are stored once, however many rows of it have the same images."""
PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
"""One row is read in half the time so, and takes less room."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The output rows of input rows."""

    rows: tuple[dict[str, Any], ...]
    parts: tuple[Totals, ...]
    """What those of each setting add up to."""
    carried: pa.Table | None = None
    """Of each input row, the columns that go along."""
    gallery: tuple[dict[str, Any], ...] = ()
    """What is kept of them for a page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """Where units go and in which columns; travels to the actors."""

    output: str
    """Directory or URI."""
    run_id: str
    id_type: pa.DataType
    also: tuple[str, ...] = ()
    """Groups of columns that the rows have beside those of all runs."""
    kept: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Columns of the input that go along, behind all others."""
    settings: int = 1
    """That each prompt is asked with."""
    pauses_s: tuple[float, ...] = ()
    """Before each further try where the storage fails."""
    sample: Sample | None = None
    """Rows that may be kept for a page."""

    def commit(
        self,
        unit: Unit,
        rows: Sequence[Mapping[str, Any]],
        stats: Sequence[Mapping[str, Any]],
        totals: Sequence[Totals],
        tell: Callable[[str], None],
        carried: pa.Table | None = None,
        gallery: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a unit; when this returns, its rows are there for good.

        Args:
            unit: whose rows these are.
            rows: all of them, in order.
            stats: of each setting, the columns of ``stats/`` that are no sums: who did it, when,
                peaks and limits.
            totals: of each setting's rows, and what they took.
            tell: takes a line for each failure but the last.
            carried: of each input row, the columns that go along; None where there are none.
            gallery: what is kept of the rows for a page.

        Raises:
            JobFailed: the last try failed, too.
        """
        check_rows(rows, unit.shard, unit.start, unit.stop, self.settings)
        counted = merge(totals)
        assert counted.rows == len(rows), f"totals of {counted.rows} rows, not of {len(rows)}"
        schema = rows_schema(self.id_type, run_id=self.run_id, also=self.also)
        table = serialise(self._with_kept(build_table(rows, schema), unit, carried))
        figures = [
            {"unit": unit.stem, "setting": setting, **own, **part.to_stats()}
            for setting, (own, part) in enumerate(zip(stats, totals, strict=True))
        ]
        summed = serialise(build_table(figures, stats_schema(run_id=self.run_id)), **PLAIN)
        shown = self._gallery_file(gallery)
        for tried, pause_s in enumerate((*self.pauses_s, None), start=1):
            try:
                out = open_location(self.output)
                write_atomic(out.join(STATS, unit.name), summed)
                self._put_gallery(out, unit, shown)
                return write_atomic(out.join(ROWS, unit.name), table)
            except OSError as error:
                reason = f"rows/{unit.name} failed {tried} times: {kind_and_line(error, 300)}"
                if pause_s is None:
                    raise JobFailed(reason) from error
                tell(reason)
                time.sleep(pause_s)

    def _gallery_file(self, lines: Sequence[Mapping[str, Any]]) -> pa.Buffer | None:
        if not lines:
            return None
        table = gallery_table(lines, self.id_type, self.run_id)
        return serialise(table, write_statistics=False, dictionary_pagesize_limit=THUMBNAIL_BYTES)

    def _put_gallery(self, out: Location, unit: Unit, shown: pa.Buffer | None) -> None:
        place = out.join(GALLERY, unit.name)
        if shown is not None:
            write_atomic(place, shown)
        elif self.sample is not None and self.sample.has_some_of(unit) and exists(place):
            remove(place)  # of a process that died before it wrote rows, which said other things

    def _with_kept(self, table: pa.Table, unit: Unit, carried: pa.Table | None) -> pa.Table:
        """With what belongs to each row's input row."""
        if not len(self.kept):
            return table
        assert carried is not None and carried.num_rows == unit.stop - unit.start
        own = carried.take([split_key(key)[1] - unit.start for key in table["row"].to_pylist()])
        for kept in self.kept:
            table = table.append_column(kept, own.column(kept.name))
        return table


def serialise(table: pa.Table, **options: Any) -> pa.Buffer:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    return sink.getvalue()
