"""Rows of work units from their shards: each row group is read once for a run.

INPUT shards as the manifest describes them and units of them; OUTPUT the units' rows as Arrow
tables under the names of the roles, image cells still encoded, with `ERRORS` where errors of rows
are known already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa

from trio.errors import first_line
from trio.job.input.kinds.raw_rows import ERROR_COLUMN
from trio.job.input.kinds.shard_kinds import TAR
from trio.job.input.kinds.tar_pictures import pictures
from trio.job.input.manifest import Shard
from trio.job.input.shard_rows import (
    ShardChanged,
    ShardGone,
    ShardUnreadable,
    check_size,
    rows_from,
)
from trio.job.input.units import Unit, group_of
from trio.job.storage import open_location

IMAGE = "image"
# of a tar's index, where the pictures lie
ERRORS = "prepared"
# column of errors that are known before images are looked at, as `stages` calls it
TRIES = 3
# of a unit, before its rows become errors


class RunReader:
    """Reads units in the order of their rows; the next one goes on where the last one ended."""

    def __init__(
        self,
        shards: Mapping[int, Shard],
        roles: Mapping[str, str],
        again: Callable[[Shard, int, ShardUnreadable], None],
    ) -> None:
        """Prepare.

        Args:
            shards: by number.
            roles: name of the column for each role.
            again: called before a unit is tried again, with its shard, the number of tries so far
                and what was wrong; what it raises ends the reading.
        """
        self._shards, self._roles, self._again = shards, roles, again
        self._cursor: _Cursor | None = None
        self._lost: set[int] = set()
        # numbers of shards that are others now, or gone

    def read(self, unit: Unit) -> pa.Table | ShardUnreadable:
        """The unit's rows, or why they cannot be had."""
        shard = self._shards[unit.shard]
        tries = 1 if unit.shard in self._lost else TRIES
        for tried in range(1, tries + 1):
            try:
                return self._cursor_at(unit).take(unit)
            except Exception as error:
                fault = _fault(error, shard)
            self.close()
            if tried < tries:
                self._again(shard, tried, fault)
        if isinstance(fault, ShardGone | ShardChanged):
            self._lost.add(unit.shard)
        return fault

    def close(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

    def _cursor_at(self, unit: Unit) -> _Cursor:
        if self._cursor is None or not self._cursor.leads_to(unit):
            self.close()
            shard = self._shards[unit.shard]
            self._cursor = _Cursor(shard, self._roles, *group_of(shard.row_groups, unit.start))
        return self._cursor


def _fault(error: Exception, shard: Shard) -> ShardUnreadable:
    if isinstance(error, ShardUnreadable):
        return error
    if isinstance(error, FileNotFoundError):
        return ShardGone(f"{shard.path}: the shard is gone since the run was planned")
    if isinstance(error, OSError | pa.ArrowException):
        return ShardUnreadable(f"{shard.path}: {first_line(error)}")
    raise error


class _Cursor:
    """A place in a shard from which rows are taken going forward."""

    def __init__(self, shard: Shard, roles: Mapping[str, str], group: int, row: int) -> None:
        self._shard, self._roles = shard, roles
        self.row = row
        # the next one to come
        also = {ERROR_COLUMN} if shard.kind == TAR else set[str]()
        self._batches = rows_from(shard, also.union(roles.values()), group)
        self._rest: pa.RecordBatch | None = None
        self._tar: pa.NativeFile | None = None

    def leads_to(self, unit: Unit) -> bool:
        """Whether the unit comes next, or later in the row group that is open."""
        first = group_of(self._shard.row_groups, unit.start)[1]
        return unit.shard == self._shard.number and first <= self.row <= unit.start

    def take(self, unit: Unit) -> pa.Table:
        """Rows [start, stop); those before are passed over."""
        parts: list[pa.RecordBatch] = []
        while self.row < unit.stop:
            if self._rest is None:
                self._rest = next(self._batches)
            batch, until = self._rest, unit.start if self.row < unit.start else unit.stop
            length = min(batch.num_rows, until - self.row)
            if self.row >= unit.start:
                parts.append(batch.slice(0, length))
            self._rest = batch.slice(length) if length < batch.num_rows else None
            self.row += length
        return self._by_role(pa.Table.from_batches(parts))

    def close(self) -> None:
        self._batches.close()
        if self._tar is not None:
            self._tar.close()

    def _by_role(self, table: pa.Table) -> pa.Table:
        there, is_tar = set(table.column_names), self._shard.kind == TAR
        named = {role: name for role, name in self._roles.items() if name in there}
        if is_tar and IMAGE in named.values():
            place = table.schema.get_field_index(IMAGE)
            table = table.set_column(place, IMAGE, self._pictures(table.column(IMAGE)))
        made = table.select(list(named.values())).rename_columns(list(named))
        if is_tar and (errors := table.column(ERROR_COLUMN)).null_count < len(table):
            made = made.append_column(ERRORS, errors)
        return made

    def _pictures(self, places: pa.ChunkedArray) -> pa.Array:
        if self._tar is None:
            location = open_location(self._shard.path)
            self._tar = location.filesystem.open_input_file(location.path)
            check_size(self._tar, self._shard)
        return pictures(self._tar, places)
