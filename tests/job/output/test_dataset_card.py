"""The card of an output, and the libraries that open what it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from tests.job.compactions import SMALL, UNITS, Steps, commit_long, compact
from tests.job.fakes import png, write_shard
from tests.job.runs import execute
from trio.job.output import output_directory
from trio.job.output.dataset_card import dataset_card
from trio.job.output.summary import summarise
from trio.job.output.totals import Totals
from trio.job.settings import Settings, made_of
from trio.job.storage import locate

TOTALS = Totals(rows=40, inputs=40, errors=1, error_kinds={"image": 1}, retention_sum=9.9,
                retention_rows=39)  # fmt: skip


RUN = {"version": "0.0.891568578"}


def summary_of(totals: Totals = TOTALS, run_id: str = "abc") -> dict[str, Any]:
    return summarise(
        totals, name="trio", run_id=run_id, wall_s=1.0, done_before=Totals(), work_s=1.0,
        resources="here",
    )  # fmt: skip


def config(**changes: Any) -> Settings:
    return made_of(**{"model": "org/name", "revision": "f" * 40, "retention": 0.25} | changes)


def test_a_card_says_what_the_run_was() -> None:
    text = dataset_card(config(prompt=("one | two?",)), summary_of())
    card = DatasetCard(text)
    assert card.data.to_dict() == {
        "pretty_name": "Captions by org/name",
        "tags": ["trio-vlm"],
        "configs": [
            {"config_name": "rows", "data_files": "rows/*.parquet", **RUN, "default": True},
            {"config_name": "stats", "data_files": "stats/*.parquet", **RUN},
        ],
    }
    facts = {
        "model": f"`org/name` at `{'f' * 40}`",
        "asked with": "trio 0.25",
        "visual tokens kept, layer average": "25.4 %",
        "prompt": r"one \| two?",
        "rows": "40",
        "rows in error": "1 (2.5 %)",
    }
    for name, value in facts.items():
        assert f"| {name} | {value} |" in card.text
    assert 'load_dataset(".", split="train")' in card.text and "Figures" not in card.text


def test_figures_and_changed_answers_are_there_where_the_run_has_them(tmp_path: Path) -> None:
    compared = config(compare=("1", "1/4"), retention=None)
    text = dataset_card(compared, summary_of(), figures="| a |", changed=("changed.parquet", 3))
    card = DatasetCard(text)
    third = {"config_name": "changed", "data_files": "changed.parquet", **RUN}
    assert card.data.to_dict()["configs"][2] == third
    assert "## Figures\n\n| a |" in card.text and "unpruned, trio 1/4" in card.text
    assert "layer average |" not in card.text
    none = DatasetCard(dataset_card(compared, summary_of(), changed=("changed.parquet", 0)))
    assert len(none.data.to_dict()["configs"]) == 2


def test_a_directory_is_named_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    text = dataset_card(config(model=f"{tmp_path}/mine/", revision=None), summary_of())
    assert "# Captions by mine" in text and str(tmp_path) not in text


def test_without_rows_there_is_nothing_to_open() -> None:
    card = DatasetCard(dataset_card(config(), summary_of(Totals())))
    assert "configs" not in card.data.to_dict() and "load_dataset" not in card.text


@pytest.mark.slow
@pytest.mark.parametrize("larger", [True, False])
def test_libraries_see_the_same_rows(tmp_path: Path, larger: bool) -> None:
    import datasets
    import duckdb
    import pandas
    import polars

    out = tmp_path / "out"
    for unit in UNITS:
        commit_long(out, unit)
    if larger:
        compact(locate(str(out)), UNITS, SMALL, Steps())
    (out / "run.yaml").write_text("model: demo\n")
    card = dataset_card(config(), summary_of(Totals(rows=2 * len(UNITS), inputs=2 * len(UNITS))))
    output_directory.close(locate(str(out)), summary_of(), also={"README.md": card})
    expected = pq.read_table(out / "rows", columns=["row", "response"]).to_pylist()
    assert len(expected) == 2 * len(UNITS)
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.select_columns(["row", "response"]).to_list() == expected
    stats = datasets.load_dataset(str(out), "stats", cache_dir=str(tmp_path / "cache"))["train"]
    assert stats["unit"][:] == [unit.stem for unit in UNITS]
    assert stats[0]["error_kinds"] == [{"name": "image", "value": 1}, {"name": "odd0", "value": 2}]
    rows = str(out / "rows")
    columns = ["row", "response"]
    assert pandas.read_parquet(rows)[columns].to_dict("records") == expected
    assert polars.read_parquet(rows)[columns].to_dicts() == expected
    for place in (rows, f"{rows}/*.parquet"):
        said = duckdb.execute(f"select row, response from read_parquet('{place}') order by row")
        assert said.fetchall() == [tuple(row.values()) for row in expected]


@pytest.mark.slow
def test_directories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """`datasets` keeps what it has read by the directory's name, and not by its path."""
    import datasets

    for number, run in enumerate(("abc", "abd")):
        out = tmp_path / run / "out"
        for unit in UNITS[: 1 + number]:
            commit_long(out, unit)
        card = dataset_card(config(), summary_of(Totals(rows=2 + 2 * number), run))
        (out / "run.yaml").write_text("model: demo\n")
        output_directory.close(locate(str(out)), summary_of(), also={"README.md": card})
        loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == 2 + 2 * number


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_job_ends_in_larger_files_and_a_resumed_one_leaves_them(tmp_path: Path) -> None:
    rows = [{"id": n, "image": png((n, 0, 0)), "prompt": f"p{n}"} for n in range(24)]
    schema = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])
    shard = write_shard(tmp_path / "in.parquet", rows, schema)
    out = tmp_path / "out"
    file = out / "rows" / "0-00000.parquet"
    for before in (0, 24):
        summary = execute(shard, out, file_mb=64)
        assert (summary["rows_before"], summary["rows"]) == (before, 24)
        assert list((out / "rows").iterdir()) == [file]
        assert pq.read_table(file)["id"].to_pylist() == list(range(24))
        assert pq.read_table(out / "stats").num_rows == 3 and (out / "_SUCCESS").exists()
        card = DatasetCard.load(out / "README.md")
        assert card.data.to_dict()["pretty_name"] == "Captions by demo"
        (out / "_SUCCESS").unlink()
