"""Runs over a real Ray: their page, one row of them again, and the command that a job prints."""

import shlex
from pathlib import Path

import pyarrow as pa
import pytest

from tests.job.fakes import png, write_shard
from tests.job.runs import execute, rows
from tests.job.store import bucket_of, serving
from tests.report.made_runs import MadeRun
from tests.report.pages import Page, outside, tiles_of
from trio.errors import UserError
from trio.job.output.ending import page_command
from trio.job.storage import locate, read_bytes
from trio.report.page import page_of
from trio.report.report_command import read, write_page

SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("prompt", pa.string())])


def shards(folder: Path) -> Path:
    for shard in range(2):
        lines = [
            {"id": f"{shard}-{n}", "image": png((20 * n, 9, 9)), "prompt": f"p{n}"}
            for n in range(10)
        ]
        lines[3]["image"] = b"no image"
        write_shard(folder / f"{shard}.parquet", lines, SCHEMA)
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_page_of_a_run_and_one_row_of_it_again(tmp_path: Path) -> None:
    source, out, again = shards(tmp_path / "in"), tmp_path / "out", tmp_path / "again"
    summary = execute(source, out)
    text = Path(write_page(str(out))).read_text()
    page, tiles = Page(text), tiles_of(text)
    assert outside(page) == [] and "finished" in page.words
    assert tiles["Rows written"] == ("20", "of 20 input rows")
    assert tiles["Errors"][0] == "2"
    rate = float(tiles["Images / s"][0].replace(",", ""))
    assert rate == pytest.approx(summary["images_per_s"], rel=0.01)
    assert {"throughput", "phases", "visual", "stages"} <= page.data["charts"].keys()

    told = {row["id"]: row for row in rows(out)}
    wanted = told["1-7"]
    execute(source, again, only_row=wanted["row"])
    (row,) = rows(again)
    same = ("row", "id", "prompt", "response", "picture", "visual_tokens_stages")
    assert {name: row[name] for name in same} == {name: wanted[name] for name in same}
    assert "1 of 1 input row" not in Path(write_page(str(again))).read_text()
    with pytest.raises(UserError, match="--only-row 99: the input has no such row"):
        execute(source, tmp_path / "none", only_row=99)


@pytest.mark.slow
def test_a_run_on_an_object_store_has_its_page_there(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "here").commit().gallery().close()
    with serving(tmp_path) as server:
        store = bucket_of(server)
        for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
            store.put(f"out/{path.relative_to(run.path).as_posix()}", path.read_bytes())
        place = write_page(store.uri("out"))
        assert place == store.at("out/report.html").uri
        text = read_bytes(store.at("out/report.html")).decode()
        with pytest.raises(UserError, match="there is no such directory"):
            write_page(store.uri("none"))
    assert tiles_of(text) == tiles_of(page_of(str(run.path)))
    page = Page(text)
    assert len(page.data["cards"]) == 12 and "--config run.yaml" in page.data["again"]


def test_the_printed_command_is_one_that_is_taken(tmp_path: Path) -> None:
    place = locate(str(tmp_path / "it's here"))
    program, *words = shlex.split(page_command(place).removeprefix("python "))
    assert program == "jobs/report.py" and read(words, "") == (place.uri, None)
