"""Commits of units."""

import datetime
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.job.input.units import Unit
from trio.job.output.schema import row_key
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals
from trio.job.resume.committed import listed, read
from trio.job.storage import locate

UNIT = Unit(1, 4, 6)
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
STATS = {
    "actor": "a", "node": "n", "start": NOW, "end": NOW, "images": 2, "prompt_tokens": 3,
    "output_tokens": 4,
}  # fmt: skip


def rows(*numbers: int) -> list[dict[str, Any]]:
    base = {"response": "x", "finish_reason": "stop", "actor": "a", "node": "n", "finished_at": NOW}
    return [{"row": row_key(1, n), "id": f"id{n}", **base} for n in numbers]


def sink(tmp_path: Path) -> Sink:
    return Sink(output=str(tmp_path), run_id="run1", id_type=pa.string(), save_kept=False)


def test_rows_statistics_and_totals_are_there_after_a_commit(tmp_path: Path) -> None:
    totals = Totals(rows=2, images=2)
    for _ in range(2):
        sink(tmp_path).commit(UNIT, rows(4, 5), STATS, totals)
    out = locate(str(tmp_path))
    found = read(out, [UNIT], "run1")
    assert (found.units, found.totals) == ({UNIT}, totals)
    assert os.listdir(tmp_path / "rows") == os.listdir(tmp_path / "stats") == [UNIT.name]
    table = pq.read_table(tmp_path / "rows")
    assert table.column("id").to_pylist() == ["id4", "id5"]
    assert table.schema.metadata[b"trio.run"] == b"run1"
    assert pq.read_table(tmp_path / "stats").column("images").to_pylist() == [2]


@pytest.mark.parametrize("numbers", [(4,), (5, 4), (4, 4), (4, 5, 6)])
def test_a_unit_with_other_rows_is_not_written(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        sink(tmp_path).commit(UNIT, rows(*numbers), STATS, Totals())
    assert listed(locate(str(tmp_path))) == set()


def test_rows_are_the_commit_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two files leaves statistics that the repeated unit replaces."""
    from trio.job.output import sink as module

    original = module.write_atomic

    def crash(location: Any, data: Any) -> None:
        if "/rows/" in location.path:
            raise OSError("crash")
        original(location, data)

    monkeypatch.setattr(module, "write_atomic", crash)
    with pytest.raises(OSError, match="crash"):
        sink(tmp_path).commit(UNIT, rows(4, 5), STATS, Totals())
    assert listed(locate(str(tmp_path))) == set()
    monkeypatch.undo()
    sink(tmp_path).commit(UNIT, rows(4, 5), STATS | {"images": 7}, Totals())
    assert pq.read_table(tmp_path / "stats").column("images").to_pylist() == [7]


def test_other_files_are_no_units(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("x.parquet", UNIT.name + ".ab12.tmp"):
        (tmp_path / "rows" / name).write_text("")
    assert listed(locate(str(tmp_path))) == set()
    assert listed(locate(str(tmp_path / "nothing"))) == set()
