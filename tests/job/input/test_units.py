"""Work units and reads."""

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio.job.input.manifest import Manifest, Shard
from trio.job.input.units import Unit, group_of, runs, unit_rows, units
from trio.job.output.schema import row_key


def manifest(*groups: Sequence[int], row_bytes: int = 1000) -> Manifest:
    return Manifest(
        shards=tuple(
            Shard(
                number=n,
                path=f"/d/{n}.parquet",
                size=sum(g) * row_bytes,
                rows=sum(g),
                row_groups=tuple(g),
                unpacked=sum(g) * row_bytes,
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


def test_an_only_row_is_a_unit_of_its_own() -> None:
    plan = manifest([10, 3], [], [20])
    assert list(units(plan, 7, 12, only_row=row_key(2, 19))) == [Unit(2, 19, 20)]


def test_names_sort_in_input_order_and_read_back() -> None:
    ordered = [Unit(0, 0, 9), Unit(0, 9, 100), Unit(0, 100, 101), Unit(2, 0, 1), Unit(11, 0, 1)]
    assert sorted(u.name for u in ordered) == [u.name for u in ordered]
    assert [Unit.of_name(u.name) for u in ordered] == ordered
    assert Unit.of_name("part-0.parquet") is None
    assert Unit.of_name(ordered[0].name + ".1a2b.tmp") is None


def test_unit_size_follows_input_actors_and_bytes() -> None:
    assert unit_rows(manifest([100_000]), actors=1) == 128
    assert unit_rows(manifest([240]), actors=1) == 15
    assert unit_rows(manifest([240]), actors=4) == 8
    assert unit_rows(manifest([100_000]), actors=1, limit=160) == 10
    assert unit_rows(manifest([100_000], row_bytes=1 << 20), actors=1) == 32
    assert unit_rows(manifest([10**8], row_bytes=1000), actors=8) == 1000
    assert unit_rows(manifest([10**9], row_bytes=1000), actors=8) == 4096
    assert unit_rows(manifest([10], row_bytes=1 << 30), actors=1) == 1


GROUPS = st.lists(st.lists(st.integers(0, 60), max_size=5), min_size=1, max_size=6)


@given(GROUPS, st.integers(1, 25), st.integers(1, 40), st.data())
def test_runs_hold_each_unit_once_and_no_row_group_is_read_by_two(
    groups: list[list[int]], size: int, parallel: int, data: st.DataObject
) -> None:
    plan = manifest(*groups, row_bytes=1 << 20)
    every = list(units(plan, size))
    todo = sorted(data.draw(st.sets(st.sampled_from(every)))) if every else []
    parts = runs(plan, todo, parallel)
    assert [unit for part in parts for unit in part] == todo and all(parts)
    for one, next_one in pairwise(parts):
        last, first = one[-1], next_one[0]
        if last.shard == first.shard:
            held = plan.shards[last.shard].row_groups
            assert group_of(held, last.stop - 1) != group_of(held, first.start)


def test_runs_are_about_as_many_as_asked_for() -> None:
    """Over several small shards, within one large one; none below or far above the limits."""
    small = manifest(*[[5]] * 40, row_bytes=1 << 20)
    assert [len(part) for part in runs(small, list(units(small, 5)), parallel=10)] == [4] * 10
    assert [len(part) for part in runs(small, list(units(small, 5)), parallel=99)] == [2] * 20
    large = manifest([50] * 4, row_bytes=1 << 20)
    starts = [part[0].start for part in runs(large, list(units(large, 10)), parallel=100)]
    assert starts == [0, 50, 100, 150]
    assert len(runs(large, list(units(large, 10)), parallel=1)) == 1
    heavy = manifest([50] * 40, row_bytes=1 << 20)
    assert len(runs(heavy, list(units(heavy, 10)), parallel=1)) == 7


def test_small_inputs_are_one_run() -> None:
    plan = manifest([50] * 4, row_bytes=1000)
    assert len(runs(plan, list(units(plan, 10)), parallel=100)) == 1


def test_group_of() -> None:
    assert [group_of([2, 0, 3], row) for row in range(5)] == [(0, 0), (0, 0), *[(2, 2)] * 3]
    with pytest.raises(IndexError):
        group_of([2], 2)


def test_what_a_shard_costs_in_the_plan() -> None:
    """README of job/: 500 bytes in memory for the units of a shard of 10,000 rows."""
    shards = manifest(*[[10_000]] * 2000)
    tracemalloc.start()
    plan = list(units(shards, 4096))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == 3 * 2000 and used / 2000 < 500
