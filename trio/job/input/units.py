"""Work units, and the runs in which tasks read them: pure functions of the manifest, so a resume
agrees.

A unit is a number of consecutive rows of one shard; it becomes one file in ``rows/`` and one in
``stats/`` under a name that says which rows it holds. A run is a number of consecutive units that
one task reads, cut where a row group begins so that none is read twice.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trio.job.input.manifest import Manifest, Shard
from trio.job.output.schema import split_key

UNIT_BYTES = 32 << 20
# input bytes, unpacked, one unit may hold on average: decoded they are about six times as many, and
# an engine holds a few units whole
MAX_UNIT_ROWS, MAX_UNIT_ROWS_EVER = 128, 4096
MANY_UNITS = 100_000
# from here on units grow: their files are listed on resume
MIN_UNIT_ROWS = 8
UNITS_PER_ACTOR = 16
MIN_RUN_BYTES, MAX_RUN_BYTES = 8 << 20, 256 << 20
_NAME = re.compile(r"^(\d{6,})-(\d{10})-(\d{10})\.parquet$")


@dataclass(frozen=True, order=True, slots=True)
class Unit:
    """Rows [start, stop) of a shard."""

    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name, which sorts in input order."""
        return f"{self.stem}.parquet"

    @property
    def stem(self) -> str:
        """The same without its ending: the unit's name in ``stats/``."""
        return f"{self.shard:06d}-{self.start:010d}-{self.stop:010d}"

    @classmethod
    def of_name(cls, name: str) -> Unit | None:
        match = _NAME.match(name)
        return cls(*(int(group) for group in match.groups())) if match else None


def unit_rows(manifest: Manifest, *, actors: int, limit: int | None = None) -> int:
    """Rows per unit: enough units to share among the actors, none too heavy to hold in memory."""
    rows = min(manifest.rows, limit) if limit is not None else manifest.rows
    row_bytes = manifest.unpacked / max(manifest.rows, 1)
    by_bytes = int(UNIT_BYTES / max(row_bytes, 1.0))
    by_share = -(-rows // (actors * UNITS_PER_ACTOR))
    most = min(max(MAX_UNIT_ROWS, rows // MANY_UNITS), MAX_UNIT_ROWS_EVER)
    return max(1, min(by_bytes, max(MIN_UNIT_ROWS, min(by_share, most))))


def units(
    manifest: Manifest,
    rows_per_unit: int,
    limit: int | None = None,
    only_row: int | None = None,
) -> Iterator[Unit]:
    """All units of the run in input order; ``limit`` counts rows from the first shard on, and
    ``only_row`` is the key of the only row."""
    if only_row is not None:
        shard, row = split_key(only_row)
        yield Unit(shard, row, row + 1)
        return
    left = manifest.rows if limit is None else limit
    for one in manifest.shards:
        rows = min(one.rows, left)
        left -= rows
        for start in range(0, rows, rows_per_unit):
            yield Unit(one.number, start, min(start + rows_per_unit, rows))


def runs(manifest: Manifest, todo: Collection[Unit], parallel: int) -> list[list[Unit]]:
    """Runs of units in input order, for one reader each; about ``parallel`` of them, cut where a
    row group or a shard begins."""
    shards = {shard.number: shard for shard in manifest.shards}
    rows = sum(unit.stop - unit.start for unit in todo)
    row_bytes = sum(s.size for s in manifest.shards if s.rows) / max(manifest.rows, 1)
    least, most = (size / max(row_bytes, 1.0) for size in (MIN_RUN_BYTES, MAX_RUN_BYTES))
    share = min(max(rows / max(parallel, 1), least), most)
    out: list[list[Unit]] = []
    length = 0
    for unit in sorted(todo):
        if not out or (length >= share and _may_cut(shards[unit.shard], out[-1][-1], unit)):
            out.append([])
            length = 0
        out[-1].append(unit)
        length += unit.stop - unit.start
    return out


def _may_cut(shard: Shard, last: Unit, unit: Unit) -> bool:
    """Whether no row group is read twice if another reader goes on with the unit."""
    if unit.shard != last.shard:
        return True
    groups = shard.row_groups
    return group_of(groups, unit.start)[0] != group_of(groups, last.stop - 1)[0]


def group_of(row_groups: Sequence[int], row: int) -> tuple[int, int]:
    """Number of the row group that holds a row, and the row with which that group begins."""
    ends = list(accumulate(row_groups))
    number = bisect_right(ends, row)
    return number, ends[number] - row_groups[number]
