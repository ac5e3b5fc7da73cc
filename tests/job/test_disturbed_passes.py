"""What passes that lost a node say of the rows in them: nothing."""

import pytest

from trio.errors import JobFailed
from trio.job.input.units import Unit
from trio.job.output.totals import Totals
from trio.job.quarantine import LONG_AGAIN, ROW_LOSSES, Attempts

UNIT = Unit(0, 0, 2)
ROWS = [Unit(0, 0, 1), Unit(0, 1, 2)]


def alone() -> Attempts:
    """A unit whose rows are each to be tried alone."""
    attempts = Attempts([UNIT], many=4)
    assert attempts.ended(disturbed=False) == [] == attempts.ended(disturbed=False)
    return attempts


def test_rows_lost_with_a_node_are_not_given_up() -> None:
    """However often that happens, as long as something is answered now and then."""
    attempts = alone()
    attempts.answered(ROWS[0], ({}, Totals()))
    for _ in range(LONG_AGAIN - 1):
        assert attempts.ended(disturbed=True) == []
    attempts.answered(ROWS[0], ({}, Totals()))
    assert attempts.ended(disturbed=True) == []
    for number in range(ROW_LOSSES):
        expected = [ROWS[1]] if number == ROW_LOSSES - 1 else []
        assert attempts.ended(disturbed=False) == expected


def test_nothing_but_lost_nodes_ends_the_job() -> None:
    attempts = alone()
    for _ in range(LONG_AGAIN - 1):
        assert attempts.ended(disturbed=True) == []
    with pytest.raises(JobFailed, match="did nothing; the same command"):
        attempts.ended(disturbed=True)
