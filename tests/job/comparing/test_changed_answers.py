"""Answers that are not the same in all settings, side by side."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.commits import STATS, answered
from trio.job.comparing import changed_answers
from trio.job.comparing.changed_answers import CHANGED, write_changed
from trio.job.input.units import Unit
from trio.job.output.file_record import HIDDEN
from trio.job.output.schema import RUN_KEY, SCORE
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals
from trio.job.storage import locate

UNITS = [Unit(0, 0, 40), Unit(0, 40, 50), Unit(1, 0, 30)]
NAMES = ("unpruned", "trio 1/9", "random 1/9")


def said(row: dict[str, Any], setting: int) -> dict[str, Any]:
    """Of every tenth row another answer in the last setting, of every twentieth an error."""
    number = row["row"] % 100
    told = {"response": f"a{number}", "score": 1.0, "prompt": f"p{number}", "setting": setting}
    if setting == 2 and number % 10 == 0:
        told |= {"response": "other", "score": 0.0}
        if number % 20 == 0:
            told |= {"response": None, "error": "image: torn", "finish_reason": "error"}
    return row | told


@pytest.mark.parametrize("scored", [True, False])
def test_what_differs_is_written_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    monkeypatch.setattr(changed_answers, "BATCH", 7)
    also = (SCORE,) if scored else ()
    sink = Sink(output=str(tmp_path), run_id="r", id_type=pa.string(), also=also, settings=3)
    for unit in UNITS:
        rows = [said(row, setting) for row in answered(unit) for setting in range(3)]
        if not scored:
            rows = [{name: row[name] for name in row if name != "score"} for row in rows]
        parts = [Totals(rows=unit.stop - unit.start)] * 3
        sink.commit(unit, rows, [STATS] * 3, parts, print)
    count = write_changed(locate(str(tmp_path)), "r", NAMES)
    table = pq.read_table(tmp_path / CHANGED)
    keys = [row["row"] for unit in UNITS for row in answered(unit) if row["row"] % 100 % 10 == 0]
    assert table["row"].to_pylist() == keys and count == len(keys) > 7
    assert table.schema.metadata[RUN_KEY] == b"r" and not (tmp_path / HIDDEN).exists()
    names = [f"{of} {name}" for of in ("response", "error") for name in NAMES]
    names += [f"score {name}" for name in NAMES if scored]
    assert table.column_names == ["row", "prompt_number", "id", "prompt", "picture", *names]
    for line in table.to_pylist():
        number = line["row"] % 100
        assert line["prompt"] == f"p{number}" and line["id"] == f"id{line['row']}"
        assert line["response unpruned"] == line["response trio 1/9"] == f"a{number}"
        gone = number % 20 == 0
        assert line["response random 1/9"] == (None if gone else "other")
        assert line["error random 1/9"] == ("image: torn" if gone else None)
        assert not scored or (line["score unpruned"], line["score random 1/9"]) == (1.0, 0.0)
