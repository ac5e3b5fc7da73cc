"""What is there already: listing, snapshot, footers."""

import datetime
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trio.job.input.manifest import Manifest, Shard
from trio.job.input.units import Unit, units
from trio.job.output.schema import row_key
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals
from trio.job.resume import committed
from trio.job.resume.committed import SNAPSHOT, drop, listed, read, save, sweep
from trio.job.storage import Location, locate

NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
PLAN = [Unit(shard, start, start + 2) for shard in range(3) for start in (0, 2, 4)]


def commit(out: Path | str, unit: Unit, run_id: str = "run1") -> None:
    sink = Sink(output=str(out), run_id=run_id, id_type=pa.string(), save_kept=False)
    base = {"response": "x", "finish_reason": "stop", "actor": "a", "node": "n", "finished_at": NOW}
    keys = (row_key(unit.shard, row) for row in range(unit.start, unit.stop))
    stats = {"actor": "a", "node": "n", "start": NOW, "end": NOW, "images": 2}
    counts = {"prompt_tokens": 3, "output_tokens": 4}
    sink.commit(unit, [{"row": key, **base} for key in keys], stats | counts, totals(unit))


def totals(*done: Unit) -> Totals:
    return Totals(
        rows=2 * len(done),
        images=sum(1 + unit.start for unit in done),
        error_kinds={"image": len(done)} if done else {},
    )


@pytest.fixture
def footers(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """Units whose footers are read."""
    seen: list[Unit] = []
    original = committed.receipt

    def note(output: Location, unit: Unit, run_id: str) -> Any:
        seen.append(unit)
        return original(output, unit, run_id)

    monkeypatch.setattr(committed, "receipt", note)
    return seen


def test_footers_are_read_only_of_what_the_snapshot_does_not_name(
    tmp_path: Path, footers: list[Unit]
) -> None:
    out = locate(str(tmp_path))
    assert read(out, PLAN, "run1") == committed.Committed(set(), Totals())
    for unit in PLAN[:6]:
        commit(tmp_path, unit)
    first = read(out, PLAN, "run1")
    assert first.units == set(PLAN[:6]) and first.totals == totals(*PLAN[:6])
    assert sorted(footers) == PLAN[:6]
    known = {PLAN[0], PLAN[1], PLAN[2], PLAN[4]}
    save(out, PLAN, known, totals(*known), "run1")
    footers.clear()
    assert read(out, PLAN, "run1") == first
    assert footers == [PLAN[3], PLAN[5]]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [SNAPSHOT]
    for _ in range(2):
        drop(out)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_file_that_was_removed_is_not_counted_from_the_snapshot(
    tmp_path: Path, footers: list[Unit]
) -> None:
    out = locate(str(tmp_path))
    for unit in PLAN:
        commit(tmp_path, unit)
    save(out, PLAN, set(PLAN), totals(*PLAN), "run1")
    (tmp_path / "rows" / PLAN[4].name).unlink()
    found = read(out, PLAN, "run1")
    left = [unit for unit in PLAN if unit != PLAN[4]]
    assert found.units == set(left) and found.totals == totals(*left)
    assert footers == left


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"run": "run1"}', "null"])
def test_a_damaged_snapshot_is_none(tmp_path: Path, damage: str) -> None:
    commit(tmp_path, PLAN[0])
    (tmp_path / SNAPSHOT).write_text(damage)
    assert read(locate(str(tmp_path)), PLAN, "run1").units == {PLAN[0]}


def test_a_snapshot_of_another_run_or_plan_is_none(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    commit(tmp_path, PLAN[0])
    save(out, PLAN, {PLAN[0]}, Totals(rows=99), "other")
    assert read(out, PLAN, "run1").totals == totals(PLAN[0])
    save(out, PLAN[:3], {PLAN[0]}, Totals(rows=99), "run1")
    assert read(out, PLAN, "run1").totals == totals(PLAN[0])


def test_damaged_and_foreign_files_are_done_again(tmp_path: Path) -> None:
    for unit in PLAN[:5]:
        commit(tmp_path, unit, run_id="other" if unit == PLAN[1] else "run1")
    whole = (tmp_path / "rows" / PLAN[2].name).read_bytes()
    (tmp_path / "rows" / PLAN[2].name).write_bytes(whole[:-200])
    (tmp_path / "rows" / PLAN[3].name).write_bytes(b"")
    (tmp_path / "rows" / PLAN[5].name).write_bytes(whole[:-40] + b"x" * 32 + whole[-8:])
    (tmp_path / "rows" / PLAN[6].name).write_bytes(b"x" * 100 + b"PAR1")
    (tmp_path / "rows" / Unit(2, 2, 5).name).write_bytes(whole)
    wrong = [*PLAN[:7], Unit(2, 2, 5)]
    assert read(locate(str(tmp_path)), wrong, "run1").units == {PLAN[0], PLAN[4]}


def test_long_footers_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "TAIL_BYTES", 64)
    commit(tmp_path, PLAN[0])
    assert read(locate(str(tmp_path)), PLAN, "run1").totals == totals(PLAN[0])


def test_a_storage_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(location: Location) -> bytes:
        raise OSError("no route")

    commit(tmp_path, PLAN[0])
    monkeypatch.setattr(committed, "_tail", away)
    with pytest.raises(OSError, match="no route"):
        read(locate(str(tmp_path)), PLAN, "run1")


def test_leftovers_in_all_places_are_swept(tmp_path: Path) -> None:
    commit(tmp_path, PLAN[0])
    for place in ("", "rows/", "stats/"):
        (tmp_path / f"{place}.x.0123abcd.tmp").write_text("")
    assert sweep(locate(str(tmp_path))) == 3
    assert listed(locate(str(tmp_path))) == {PLAN[0]}


def test_what_a_shard_costs_in_the_snapshot_and_the_plan(tmp_path: Path) -> None:
    """README of job/: 6 bytes a shard on disk at worst, 500 in memory for its units."""
    count = 2000
    shards = [
        Shard(number=i, path="x", size=10**9, rows=10_000, row_groups=(10_000,))
        for i in range(count)
    ]
    manifest = Manifest(shards=tuple(shards))
    tracemalloc.start()
    plan = list(units(manifest, 4096))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == 3 * count and used / count < 500
    out = locate(str(tmp_path))
    every_other = set(plan[::2])
    save(out, plan, every_other, Totals(rows=1), "run1")
    assert (tmp_path / SNAPSHOT).stat().st_size / count < 6.5
    assert committed._snapshot(out, plan, "run1") == (every_other, Totals(rows=1))
    save(out, plan, set(plan), Totals(rows=1), "run1")
    assert (tmp_path / SNAPSHOT).stat().st_size < 1000
