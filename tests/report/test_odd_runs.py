"""The page about runs of other versions, with damaged files and with odd values."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.made_runs import MadeRun, spoil
from tests.report.pages import Page, tiles_of
from trio.job.input.units import Unit
from trio.job.resume.committed import listed
from trio.report.page import page_of

COMPARE = ("1", "given")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 4.7 MB of plotly, which take longest to parse."""
    monkeypatch.setattr("trio.report.page.get_plotlyjs", lambda: "let plotly;")


def test_a_damaged_file_of_the_gallery_is_left_out(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).commit().gallery().close()
    (good,) = (run.path / "gallery").iterdir()
    second, third = (good.with_name(unit.name) for unit in _later_units(run))
    second.write_bytes(good.read_bytes())
    spoil(second)
    third.write_bytes(b"PAR1 and no more")
    page = Page(page_of(str(run.path)))
    assert len(page.data["cards"]) == 12
    assert "Damaged, and left out" in page.text
    assert second.name in page.text and third.name in page.text


def _later_units(run: MadeRun) -> list[Unit]:
    return sorted(listed(run.output))[1:3]


def test_settings_without_a_name_are_shown_all_the_same(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, compare=("1", "given", "fastv:1/2")).commit()
    config = run.path / "run.yaml"
    text = re.sub(
        r"^compare:(.*\n)(- .*\n)*", "compare: [1, given]\n", config.read_text(), flags=re.M
    )
    config.write_text(text + "setting_of_tomorrow: 3\n")
    html = page_of(str(run.path))
    assert Page(html).data["names"] == ["unpruned", "given", "setting 2"]
    assert tiles_of(html)["Rows written"][0] == f"{len(run.rows)}"


def test_what_an_older_version_did_not_count_is_nothing(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).commit()
    for path in (run.path / "stats").iterdir():
        table = pq.read_table(path)
        older = table.drop_columns(["error_kinds", "cuda_graphs", "audit_s", "idle_s", "images"])
        pq.write_table(older, path)
    assert tiles_of(page_of(str(run.path)))["Rows written"][0] == "24"


def test_a_run_of_another_version_has_a_page(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, compare=COMPARE).commit()
    config = run.path / "run.yaml"
    config.write_text(config.read_text() + "setting_of_tomorrow: 3\n")
    page = Page(page_of(str(run.path)))
    assert "setting_of_tomorrow: 3" in page.text and page.data["names"] == ["unpruned", "given"]


def test_the_most_frequent_errors_are_told_of_with_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MadeRun(tmp_path).commit()
    for path in (run.path / "rows").iterdir():
        rows = pq.read_table(path)
        errors = [f"rare_{n}: x" if n == 0 else e for n, e in enumerate(rows["error"].to_pylist())]
        place = rows.schema.get_field_index("error")
        pq.write_table(rows.set_column(place, "error", pa.array(errors)), path)
    for path in (run.path / "stats").iterdir():
        stats = pq.read_table(path)
        kinds = [[("image_invalid", 2), ("rare_0", 1)]] * stats.num_rows
        place = stats.schema.get_field_index("error_kinds")
        cells = [[{"name": n, "value": v} for n, v in cell] for cell in kinds]
        column = pa.array(cells, stats.schema.field("error_kinds").type)
        pq.write_table(stats.set_column(place, "error_kinds", column), path)
    monkeypatch.setattr("trio.report.page.MOST_KINDS", 1)
    page = Page(page_of(str(run.path)))
    assert "And 1 more kind." in page.words
    assert "image_invalid" in page.words and "rare_0" not in page.words
    assert "image_invalid: not an image <b>at all</b>" in page.words


def test_numbers_that_are_none_do_not_end_the_page(tmp_path: Path) -> None:
    """A gallery whose rows lack all that may be null."""
    run = MadeRun(tmp_path).commit()
    run.gallery()
    path = next((run.path / "gallery").iterdir())
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    bare = [
        {name: row[name] for name in ("row", "prompt_number", "setting", "why", "finish_reason")}
        | {"thumbnails": [b"no jpeg"], "score": float("nan")}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(bare, pq.read_schema(path)), path)
    (first, *_) = Page(page_of(str(run.path))).data["cards"]
    assert first["images"] == [] and first["answers"][0]["score"] is None
