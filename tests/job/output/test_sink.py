"""Commits of units."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.commits import STATS, answered, commit, totals_of
from trio.errors import JobFailed
from trio.job.input.units import Unit
from trio.job.output import sink as module
from trio.job.output.gallery import Sample
from trio.job.output.schema import row_key
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals, from_pairs
from trio.job.resume.committed import listed, totals
from trio.job.storage import locate

UNIT = Unit(1, 4, 6)


def test_rows_and_statistics_are_there_after_a_commit(tmp_path: Path) -> None:
    for _ in range(2):
        commit(tmp_path, UNIT)
    out = locate(str(tmp_path))
    assert listed(out) == {UNIT} and totals(out, [UNIT], "run1") == totals_of(UNIT)
    assert os.listdir(tmp_path / "rows") == os.listdir(tmp_path / "stats") == [UNIT.name]
    rows, stats = pq.read_table(tmp_path / "rows"), pq.read_table(tmp_path / "stats")
    assert rows.column("row").to_pylist() == [(1 << 32) + 4, (1 << 32) + 5]
    assert rows.schema.metadata[b"trio.run"] == stats.schema.metadata[b"trio.run"] == b"run1"
    assert stats.column("unit").to_pylist() == ["000001-0000000004-0000000006"]
    assert from_pairs(stats["error_kinds"][0].as_py()) == {"image": 1, "odd4": 2}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (answered(Unit(1, 4, 5)), totals_of(UNIT)),
        (answered(UNIT)[::-1], totals_of(UNIT)),
        (answered(UNIT), Totals(rows=1)),
    ],
    ids=["missing row", "wrong order", "other totals"],
)
def test_a_unit_that_does_not_add_up_is_not_written(
    tmp_path: Path, rows: Any, told: Totals
) -> None:
    sink = Sink(output=str(tmp_path), run_id="run1", id_type=pa.string())
    with pytest.raises(AssertionError):
        sink.commit(UNIT, rows, [STATS], [told], print)
    assert os.listdir(tmp_path) == []


def test_rows_are_the_commit_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two files leaves statistics that the repeated unit replaces."""
    original = module.write_atomic

    def crash(location: Any, data: Any) -> None:
        if "/rows/" in location.path:
            raise OSError("crash")
        original(location, data)

    monkeypatch.setattr(module, "write_atomic", crash)
    with pytest.raises(JobFailed, match="failed 1 times: OSError: crash"):
        commit(tmp_path, UNIT, "earlier")
    assert listed(locate(str(tmp_path))) == set() and os.listdir(tmp_path / "stats") == [UNIT.name]
    monkeypatch.undo()
    commit(tmp_path, UNIT)
    assert totals(locate(str(tmp_path)), [UNIT], "run1") == totals_of(UNIT)


def test_what_a_page_shows_is_there_before_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what an attempt left that died before its rows goes, where the next one keeps nothing."""
    written: list[str] = []
    original = module.write_atomic

    def note(location: Any, data: Any) -> None:
        written.append(location.path.split("/")[-2])
        original(location, data)

    monkeypatch.setattr(module, "write_atomic", note)
    kept = frozenset({row_key(1, 5)})
    sink = Sink(
        output=str(tmp_path), run_id="run1", id_type=pa.string(),
        sample=Sample(kept=kept, wider=kept),
    )  # fmt: skip
    line = answered(UNIT)[1] | {"why": "sample", "thumbnails": [], "image_sizes": []}
    del line["actor"], line["node"], line["finished_at"]
    place = tmp_path / "gallery" / UNIT.name
    for gallery in ([line], [line], []):
        sink.commit(UNIT, answered(UNIT), [STATS], [totals_of(UNIT)], print, gallery=gallery)
        if gallery:
            (found,) = pq.read_table(place).to_pylist()
            assert (found["row"], found["id"]) == (line["row"], line["id"])
    assert written == ["stats", "gallery", "rows"] * 2 + ["stats", "rows"]
    assert not place.exists() and listed(locate(str(tmp_path))) == {UNIT}


def test_a_storage_that_fails_is_tried_again_and_then_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = Sink(
        output=str(tmp_path / "file"), run_id="r", id_type=pa.string(),
        pauses_s=(0.0,) * 4,
    )  # fmt: skip
    said: list[str] = []
    with pytest.raises(JobFailed, match=f"rows/{UNIT.name} failed 5 times: "):
        sink.commit(UNIT, answered(UNIT), [STATS], [totals_of(UNIT)], said.append)
    assert [line.split(": ")[0].rpartition("failed ")[2] for line in said] == [
        f"{n} times" for n in range(1, 5)
    ]
