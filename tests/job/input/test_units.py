"""Work units and reads."""

import tracemalloc
from collections.abc import Sequence

import pytest

from trio.job.input.manifest import Manifest, Shard
from trio.job.input.units import Unit, group_of, runs, unit_rows, units


def manifest(*groups: Sequence[int], row_bytes: int = 1000) -> Manifest:
    return Manifest(
        shards=tuple(
            Shard(
                number=n,
                path=f"/d/{n}.parquet",
                size=sum(g) * row_bytes,
                rows=sum(g),
                row_groups=tuple(g),
            )
            for n, g in enumerate(groups)
        )
    )


@pytest.mark.parametrize("limit", [None, 1, 12, 30, 1000])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_units_cover_every_row_once(size: int, limit: int | None) -> None:
    plan = manifest([10, 3], [], [20])
    rows = [(u.shard, r) for u in units(plan, size, limit) for r in range(u.start, u.stop)]
    all_rows = [(s.number, r) for s in plan.shards for r in range(s.rows)]
    assert rows == all_rows[:limit]


def test_names_sort_in_input_order_and_read_back() -> None:
    ordered = [Unit(0, 0, 9), Unit(0, 9, 100), Unit(0, 100, 101), Unit(2, 0, 1), Unit(11, 0, 1)]
    assert sorted(u.name for u in ordered) == [u.name for u in ordered]
    assert [Unit.of_name(u.name) for u in ordered] == ordered
    assert Unit.of_name("part-0.parquet") is None
    assert Unit.of_name(ordered[0].name + ".1a2b.tmp") is None


def test_unit_size_follows_input_actors_and_bytes() -> None:
    assert unit_rows(manifest([100_000]), actors=1) == 512
    assert unit_rows(manifest([240]), actors=1) == 15
    assert unit_rows(manifest([240]), actors=4) == 8
    assert unit_rows(manifest([100_000]), actors=1, limit=160) == 10
    assert unit_rows(manifest([100_000], row_bytes=1 << 20), actors=1) == 128
    assert unit_rows(manifest([10**8], row_bytes=1000), actors=8) == 1000
    assert unit_rows(manifest([10**9], row_bytes=1000), actors=8) == 4096
    assert unit_rows(manifest([10], row_bytes=1 << 30), actors=1) == 1


def test_runs_hold_each_unit_once_and_stay_in_a_shard() -> None:
    plan = manifest([50] * 4, [30], row_bytes=1 << 20)
    todo = list(units(plan, 10))
    parts = runs(plan, todo, parallel=8)
    assert [unit for part in parts for unit in part] == todo
    assert all(len({u.shard for u in part}) == 1 for part in parts)


def test_runs_are_cut_where_row_groups_begin() -> None:
    plan = manifest([50] * 4, row_bytes=1 << 20)
    starts = [part[0].start for part in runs(plan, list(units(plan, 10)), parallel=100)]
    assert starts == [0, 50, 100, 150]


def test_small_inputs_are_one_run() -> None:
    plan = manifest([50] * 4, row_bytes=1000)
    assert len(runs(plan, list(units(plan, 10)), parallel=100)) == 1


def test_done_units_are_in_no_run() -> None:
    plan = manifest([10, 10], [10], row_bytes=1 << 20)
    todo = [u for u in units(plan, 5) if u.start == 5]
    assert [u for part in runs(plan, todo, parallel=1) for u in part] == todo
    assert runs(plan, [], parallel=4) == []


def test_group_of() -> None:
    assert [group_of([2, 0, 3], row) for row in range(5)] == [(0, 0), (0, 0), *[(2, 2)] * 3]
    with pytest.raises(AssertionError):
        group_of([2], 2)


def test_what_a_shard_costs_in_the_plan() -> None:
    """README of job/: 500 bytes in memory for the units of a shard of 10,000 rows."""
    shards = manifest(*[[10_000]] * 2000)
    tracemalloc.start()
    plan = list(units(shards, 4096))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == 3 * 2000 and used / 2000 < 500
