"""Which units go into the next pass, and which rows are given up. No Ray, no clock.

A process that dies takes units along that are not at fault. So they are done again in ever smaller
company: each alone, then each row alone. A row that is lost alone twice killed its process itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from trio.errors import JobFailed
from trio.job.input.units import Unit
from trio.job.output.sink import Answered
from trio.tables import counted

ROW_LOSSES = 2
# of a row that was alone, from which on it is an error
LONG_PASSES = 3
# most passes over long runs, beside those that were disturbed
BARREN = 3
# disturbed passes in a row with nothing gained, from which on the job fails
SYSTEMATIC = 16
# rows that are lost alone, and none was ever answered: more of them do not all kill
Kind = Literal["long", "alone", "rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPlan:
    """What a pass is to do."""

    number: int
    kind: Kind
    """`long`: consecutive units in one reader, several at a time in an engine; `alone`: each unit
    by itself; `rows`: the same with units of a single row, which the driver commits."""
    units: tuple[Unit, ...]
    why: str
    """In a line; empty for the first one."""


class Attempts:
    """What is open of a run, and what has been tried."""

    def __init__(self, units: Iterable[Unit], *, many: int) -> None:
        """Prepare.

        Args:
            units: to be done.
            many: more open units than so many are not the ones that a few dead processes held.
        """
        self._open = dict.fromkeys(units)
        self._many = many
        self._kind: Kind = "long"
        self._ever = False
        # whether any pass has brought anything
        self._unit_of: dict[Unit, Unit] = {}
        # by the unit of a single row
        self._number = self._long = self._barren = 0
        # passes; those over long runs; those that were disturbed, with nothing gained since
        self._rows: dict[Unit, dict[Unit, Answered]] = {}
        # by unit, then by the unit of the single row
        self._alone: Counter[Unit] = Counter()

    @property
    def open(self) -> Collection[Unit]:
        """Units that are not committed, in the order of their rows."""
        return self._open

    def next(self) -> PassPlan | None:
        """The next pass; None when nothing is open."""
        if not self._open:
            return None
        units = tuple(self._open)
        if self._kind == "rows":
            units = tuple(self._missing_rows())
        return PassPlan(number=self._number, kind=self._kind, units=units, why=self._why(units))

    def committed(self, unit: Unit) -> None:
        self._barren, self._ever = 0, True
        self._open.pop(unit, None)
        self._rows.pop(unit, None)

    def answered(self, row: Unit, said: Answered) -> None:
        """A single row has its answer or its error."""
        self._barren, self._ever = 0, True
        self._rows[self._unit_of[row]][row] = said

    def ended(self, *, disturbed: bool) -> list[Unit]:
        """A pass is over; returns rows that are to be given up, as units of a single row.

        Args:
            disturbed: a node or the pass itself was lost: what is missing says nothing of the rows.

        Raises:
            JobFailed: one pass after another is disturbed, and nothing gained; or processes die
                whatever they do.
        """
        self._number += 1
        if disturbed:
            self._barren += 1
            if self._barren == BARREN:
                raise JobFailed(f"{BARREN} passes in a row were lost, and nothing was done in them")
            return []
        self._barren = 0
        if not self._ever:
            self._check_systematic()
        if self._kind == "rows":
            missing = self._missing_rows()
            self._alone.update(missing)
            return [row for row in missing if self._alone[row] >= ROW_LOSSES]
        self._long += 1
        if self._kind == "long" and len(self._open) > self._many and self._long < LONG_PASSES:
            return []
        self._kind = "alone" if self._kind == "long" else "rows"
        if self._kind == "rows":
            self._rows = {unit: {} for unit in self._open}
            self._unit_of = {row: unit for unit in self._open for row in single_rows(unit)}
        return []

    def _check_systematic(self) -> None:
        """Raise where so much was lost, and nothing done, that no rows are at fault."""
        long = self._kind == "long" and len(self._open) > self._many
        if long or (self._kind == "rows" and len(self._missing_rows()) > SYSTEMATIC):
            raise JobFailed(
                f"{counted(len(self._open), 'unit')} lost with processes that died, and nothing"
                " done: no rows are at fault, but the machines or what they run"
            )

    def whole(self) -> list[tuple[Unit, list[Answered]]]:
        """Units whose rows are all known and in order, to be committed."""
        return [
            (unit, [rows[row] for row in sorted(rows)])
            for unit, rows in self._rows.items()
            if len(rows) == unit.stop - unit.start
        ]

    def _missing_rows(self) -> list[Unit]:
        return [
            row for unit, rows in self._rows.items() for row in single_rows(unit) if row not in rows
        ]

    def _why(self, units: Collection[Unit]) -> str:
        if self._number == 0:
            return ""
        what = counted(len(units), "row" if self._kind == "rows" else "unit")
        how = "" if self._kind == "long" else ", each alone"
        lost = "was" if len(units) == 1 else "were"
        return f"pass {self._number}: {what} that {lost} lost with a process{how}"


def single_rows(unit: Unit) -> list[Unit]:
    """A unit's rows, each as a unit."""
    return [Unit(unit.shard, row, row + 1) for row in range(unit.start, unit.stop)]
