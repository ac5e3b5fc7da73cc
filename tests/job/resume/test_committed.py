"""What is there already: one listing, and the statistics of what it names."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.job.commits import commit, totals_of
from trio.errors import UserError
from trio.job.input.units import Unit
from trio.job.output.totals import Totals
from trio.job.resume import committed
from trio.job.resume.committed import listed, sweep, sweep_gallery, totals
from trio.job.storage import Location, locate

PLAN = [Unit(shard, start, start + 2) for shard in range(3) for start in (0, 2, 4)]


def test_a_unit_is_done_if_its_rows_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committed, "BATCH", 4)
    out = locate(str(tmp_path))
    assert listed(out) == set() and totals(out, set(), "run1") == Totals()
    for unit in PLAN:
        commit(tmp_path, unit)
    (tmp_path / "rows" / PLAN[4].name).unlink()
    (tmp_path / "stats" / PLAN[5].name).write_bytes(b"nobody asks for these")
    for other in ("x.parquet", f"{PLAN[4].name}.ab12.tmp"):
        (tmp_path / "rows" / other).write_text("")
    done = set(PLAN) - {PLAN[4]}
    assert listed(out) == done
    done -= {PLAN[5]}
    assert totals(out, done, "run1") == totals_of(*done)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-200]),
        lambda file: file.write_bytes(b"PAR1" + bytes(99) + b"PAR1"),
        lambda file: pq.write_table(pq.read_table(file).drop("rows"), file),
        lambda file: commit(file.parent.parent, PLAN[3], "other"),
        lambda file: (file.parent / PLAN[5].name).rename(file),
    ],
)
def test_statistics_that_cannot_be_used_are_named(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    for unit in PLAN:
        commit(tmp_path, unit)
    damage(tmp_path / "stats" / PLAN[3].name)
    cure = f"stats/{PLAN[3].name} cannot be used .*: remove .*/rows/{PLAN[3].name} and start again"
    with pytest.raises(UserError, match=cure) as caught:
        totals(locate(str(tmp_path)), PLAN[:5], "run1")
    assert "\n" not in str(caught.value)
    assert totals(locate(str(tmp_path)), PLAN[:3], "run1") == totals_of(*PLAN[:3])


def test_a_storage_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(location: Location) -> bytes:
        raise OSError("no route")

    monkeypatch.setattr(committed, "read_bytes", away)
    with pytest.raises(OSError, match="no route"):
        totals(locate(str(tmp_path)), PLAN, "run1")


def test_leftovers_in_all_places_are_swept(tmp_path: Path) -> None:
    commit(tmp_path, PLAN[0])
    (tmp_path / "gallery").mkdir()
    for place in ("", "rows/", "stats/", "gallery/"):
        (tmp_path / f"{place}.x.0123abcd.tmp").write_text("")
    sweep(locate(str(tmp_path)))
    assert not list(tmp_path.rglob("*.tmp"))
    assert listed(locate(str(tmp_path))) == {PLAN[0]}


def test_what_a_page_shows_of_units_without_rows_is_removed(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    sweep_gallery(out, set())
    (tmp_path / "gallery").mkdir()
    for name in (PLAN[0].name, PLAN[1].name, "notes.txt"):
        (tmp_path / "gallery" / name).write_text("x")
    commit(tmp_path, PLAN[0])
    sweep_gallery(out, listed(out))
    assert sorted(os.listdir(tmp_path / "gallery")) == [PLAN[0].name, "notes.txt"]
