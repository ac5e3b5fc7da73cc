"""Rows that kill their process: what passes make of them, simulated pass by pass."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.errors import JobFailed
from trio.job.input.units import Unit
from trio.job.output.sink import Answered
from trio.job.output.totals import Totals
from trio.job.quarantine import (
    BARREN,
    LONG_PASSES,
    ROW_LOSSES,
    Attempts,
    PassPlan,
    single_rows,
)

UNITS = [Unit(shard, 4 * n, 4 * n + 4) for shard in range(2) for n in range(5)]
ROWS = [row for unit in UNITS for row in single_rows(unit)]
SAID = Answered(({},), (Totals(),))
MOST = LONG_PASSES + 1 + ROW_LOSSES


class Simulated:
    """A run in which killers take their unit along, and in a long pass chance takes others."""

    def __init__(self, killers: set[Unit], chance: st.DataObject, *, nodes: int) -> None:
        self._killers, self._chance, self._nodes = killers, chance, nodes
        many = chance.draw(st.integers(0, len(UNITS)))
        self.attempts = Attempts(UNITS, many=many)
        self.committed: Counter[Unit] = Counter()
        self.given_up: Counter[Unit] = Counter()
        self.calm: Counter[Unit] = Counter()
        # how often a row was alone in a pass that nothing disturbed
        self.passes = self.disturbed = 0

    def run(self) -> None:
        while plan := self.attempts.next():
            disturbed = self._nodes > 0 and self._chance.draw(st.booleans())
            self.passes, self.disturbed = self.passes + 1, self.disturbed + disturbed
            self._nodes -= disturbed
            kept = self._pass(plan, disturbed)
            assert not kept & self._killers
            for row in self.attempts.ended(disturbed=disturbed):
                self.given_up[row] += 1
                self.attempts.answered(row, SAID)
            for unit, rows in self.attempts.whole():
                assert len(rows) == 4
                self._commit(unit)

    def _pass(self, plan: PassPlan, disturbed: bool) -> set[Unit]:
        """What comes through; other units go with a killer only where they have its company."""
        through = {unit for unit in plan.units if not self._killers & set(single_rows(unit))}
        if disturbed or (plan.kind == "long" and len(through) < len(plan.units)):
            lost = self._chance.draw(st.sets(st.sampled_from(plan.units)))
            # Where a pass loses everything, no rows are at fault.
            through = (through - lost) or set(sorted(through)[:1])
        for unit in sorted(through):
            if plan.kind == "rows":
                self.attempts.answered(unit, SAID)
            else:
                self._commit(unit)
        if plan.kind == "rows" and not disturbed:
            self.calm.update(plan.units)
        return through

    def _commit(self, unit: Unit) -> None:
        self.committed[unit] += 1
        self.attempts.committed(unit)


@settings(deadline=None)
@given(st.sets(st.sampled_from(ROWS), max_size=6), st.data())
def test_exactly_the_killers_are_given_up(killers: set[Unit], chance: st.DataObject) -> None:
    run = Simulated(killers, chance, nodes=chance.draw(st.integers(0, BARREN - 1)))
    run.run()
    assert run.committed == Counter(UNITS)
    assert run.given_up == Counter(killers)
    assert all(run.calm[row] == ROW_LOSSES for row in killers)
    assert run.passes <= MOST + run.disturbed


def test_without_losses_there_is_one_pass() -> None:
    run = Attempts(UNITS, many=0)
    plan = run.next()
    assert plan == PassPlan(number=0, kind="long", units=tuple(UNITS), why="")
    for unit in UNITS:
        run.committed(unit)
    assert run.ended(disturbed=False) == [] and run.next() is None and not run.open


def test_lost_passes_with_nothing_done_end_the_job() -> None:
    run = Attempts(UNITS, many=0)
    for unit in UNITS:
        assert run.ended(disturbed=True) == []
        run.committed(unit)
    for _ in range(BARREN - 1):
        run = run if run.open else Attempts(UNITS, many=0)
        assert run.ended(disturbed=True) == []
    with pytest.raises(JobFailed, match="nothing was done"):
        run.ended(disturbed=True)


def test_where_everything_dies_no_rows_are_at_fault() -> None:
    with pytest.raises(JobFailed, match="no rows are at fault"):
        Attempts(UNITS, many=8).ended(disturbed=False)
    few = Attempts(UNITS, many=len(UNITS))
    assert few.ended(disturbed=False) == few.ended(disturbed=False) == []
    with pytest.raises(JobFailed, match="no rows are at fault"):
        few.ended(disturbed=False)


def test_a_pass_says_what_it_does_again() -> None:
    run = Attempts(UNITS, many=3)
    for unit in UNITS[1:]:
        run.committed(unit)
    seen = []
    while plan := run.next():
        seen.append((plan.kind, len(plan.units), plan.why))
        for row in run.ended(disturbed=False):
            run.answered(row, SAID)
        for unit, _ in run.whole():
            run.committed(unit)
    assert seen == [
        ("long", 1, ""),
        ("alone", 1, "pass 1: 1 unit that was lost with a process, each alone"),
        ("rows", 4, "pass 2: 4 rows that were lost with a process, each alone"),
        ("rows", 4, "pass 3: 4 rows that were lost with a process, each alone"),
    ]
