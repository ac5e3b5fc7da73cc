"""Work units and the reads that feed them: pure functions of the manifest, so a resume agrees.

A unit is a run of consecutive rows of one shard; it becomes one file in ``rows/`` and one in
``stats/`` under a name that says which rows it holds. A read is a run of units that one Ray task
streams, cut where a row group begins so that none is decoded twice for large ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from trio.pipeline.manifest import Manifest, Shard

UNIT_BYTES = 64 << 20
# encoded input bytes one unit may hold on average: it travels through the object store whole
MAX_UNIT_ROWS = 512
MIN_UNIT_ROWS = 8
UNITS_PER_ACTOR = 16
MIN_READ_BYTES, MAX_READ_BYTES = 8 << 20, 256 << 20
# of one read task: less is not worth a process, more takes long to do again
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
        return f"{self.shard:06d}-{self.start:010d}-{self.stop:010d}.parquet"

    @classmethod
    def of_name(cls, name: str) -> Unit | None:
        match = _NAME.match(name)
        return cls(*(int(group) for group in match.groups())) if match else None


@dataclass(frozen=True, slots=True)
class Read:
    """Units of one shard that one task reads in one go."""

    shard: Shard
    units: tuple[Unit, ...]


def unit_rows(manifest: Manifest, *, actors: int, limit: int | None = None) -> int:
    """Rows per unit: enough units to share among the actors, none too heavy to hold in memory."""
    rows = min(manifest.rows, limit) if limit is not None else manifest.rows
    row_bytes = manifest.size / max(manifest.rows, 1)
    by_bytes = int(UNIT_BYTES / max(row_bytes, 1.0))
    by_share = -(-rows // (actors * UNITS_PER_ACTOR))
    return max(1, min(by_bytes, max(MIN_UNIT_ROWS, min(by_share, MAX_UNIT_ROWS))))


def units(manifest: Manifest, rows_per_unit: int, limit: int | None = None) -> Iterator[Unit]:
    """All units of the run in input order; ``limit`` counts rows from the first shard on."""
    left = manifest.rows if limit is None else limit
    for shard in manifest.shards:
        rows = min(shard.rows, left)
        left -= rows
        for start in range(0, rows, rows_per_unit):
            yield Unit(shard.number, start, min(start + rows_per_unit, rows))


def reads(manifest: Manifest, todo: Collection[Unit], parallel: int) -> list[Read]:
    """Reads for the units still to do; about ``parallel`` of them where row groups allow it."""
    shards = {shard.number: shard for shard in manifest.shards}
    ordered = sorted(todo)
    rows = sum(unit.stop - unit.start for unit in ordered)
    row_bytes = manifest.size / max(manifest.rows, 1)
    least, most = (size / max(row_bytes, 1.0) for size in (MIN_READ_BYTES, MAX_READ_BYTES))
    share = min(max(rows / max(parallel, 1), least), most)
    out: list[Read] = []
    pending: list[Unit] = []
    for unit in ordered:
        if pending and _cut_before(pending, unit, shards, share):
            out.append(Read(shards[pending[0].shard], tuple(pending)))
            pending = []
        pending.append(unit)
    if pending:
        out.append(Read(shards[pending[0].shard], tuple(pending)))
    return out


def _cut_before(
    pending: Sequence[Unit], unit: Unit, shards: dict[int, Shard], share: float
) -> bool:
    if unit.shard != pending[0].shard:
        return True
    if sum(u.stop - u.start for u in pending) < share:
        return False
    groups = shards[unit.shard].row_groups
    return group_of(groups, unit.start) != group_of(groups, pending[-1].stop - 1)


def group_of(row_groups: Sequence[int], row: int) -> int:
    """Number of the row group that holds a row."""
    for number, rows in enumerate(row_groups):
        if row < rows:
            return number
        row -= rows
    raise AssertionError(f"row {row} lies behind the last row group")
