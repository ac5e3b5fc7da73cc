"""Columns that go along: which, under which names and types, partitions among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.commits import STATS, answered
from tests.job.fakes import write_shard
from trio.errors import UserError
from trio.job.input.columns import CARRIED, OWN, Columns, of_template
from trio.job.input.manifest import Shard
from trio.job.input.own_columns import (
    kept_columns,
    partitions,
    sources_of,
    with_fields,
    with_partitions,
)
from trio.job.input.units import Unit
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals
from trio.job.plan import plan
from trio.job.settings import made_of
from trio.vqa.presets.prompt_template import PromptTemplate

OURS = ("row", "id", "prompt", "note")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


def kept(
    wanted: tuple[str, ...], *schemas: pa.Schema, given: tuple[str, ...] = ("id",)
) -> tuple[pa.Schema, list[str]]:
    said: list[str] = []
    paths = [f"s{n}.parquet" for n in range(len(schemas))]
    found = kept_columns(wanted, schemas, paths, given=given, ours=OURS, say=said.append)
    return found, said


def test_named_columns_keep_their_types() -> None:
    kinds = schema(image=IMAGE, url=pa.large_string(), width=pa.int16(), at=pa.timestamp("ns"))
    found, said = kept(("at", "url", "image"), kinds)
    assert found.equals(schema(at=kinds.field("at").type, url=pa.large_string(), image=IMAGE))
    assert sources_of(found) == ["at", "url", "image"] and said == []


def test_all_are_those_without_images() -> None:
    kinds = schema(
        image=pa.string(), thumb=IMAGE, raw=pa.list_(pa.binary()), tags=pa.list_(pa.string()),
        url=pa.dictionary(pa.int8(), pa.string()),
    )  # fmt: skip
    found, said = kept(("all",), kinds)
    wanted = schema(image=pa.string(), tags=pa.list_(pa.string()), url=pa.string())
    assert found.equals(wanted), "a path is no image"
    assert said == ["--keep-columns all: thumb, raw left out (bytes); name what to keep"]


def test_a_name_that_is_ours_gets_a_prefix() -> None:
    kinds = schema(image=IMAGE, note=pa.string(), input_note=pa.int8(), row=pa.int64())
    found, said = kept(("note", "input_note", "row"), kinds)
    assert found.names == ["input_input_note", "input_note", "input_row"]
    assert sources_of(found) == ["note", "input_note", "row"]
    assert len(said) == 2 and "'note' itself; yours is 'input_input_note'" in said[0]


def test_shards_are_brought_to_one_type() -> None:
    shards = schema(w=pa.int16()), schema(w=pa.int64(), x=pa.string()), schema(w=pa.null())
    found, _ = kept(("w", "x"), *shards)
    assert found.equals(schema(w=pa.int64(), x=pa.string()))
    with pytest.raises(UserError, match=r"s1.parquet: column 'w' is string, elsewhere int16"):
        kept(("w",), schema(w=pa.int16()), schema(w=pa.string()))


def test_columns_that_do_not_go_along_may_be_of_any_type() -> None:
    shards = [schema(id=kind, w=kind, url=pa.string()) for kind in (pa.int16(), pa.string())]
    assert kept(("url",), *shards)[0].names == ["url"]
    shards = [schema(id=kind, url=pa.string()) for kind in (pa.int16(), pa.string())]
    assert kept(("all",), *shards)[0].names == ["url"], "the output has the id itself"


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.uint8(), pa.int16(), pa.int16()),
        (pa.uint64(), pa.int8(), None),
        (pa.int64(), pa.float64(), None),
        (pa.int8(), pa.float64(), None),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.list_(pa.int8()), pa.list_(pa.int32()), pa.list_(pa.int32())),
        (pa.timestamp("s"), pa.timestamp("ns"), None),
    ],
)
def test_no_value_changes_by_that(
    one: pa.DataType, other: pa.DataType, both: pa.DataType | None
) -> None:
    """Else rows would fail in the middle of a run, or say something else."""
    if both is None:
        with pytest.raises(UserError, match="give all shards one type"):
            kept(("w",), schema(w=one), schema(w=other))
    else:
        assert kept(("w",), schema(w=one), schema(w=other))[0].equals(schema(w=both))


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(UserError, match="--keep-columns wide: the input has no such column; it"):
        kept(("wide",), schema(width=pa.int8()))


def test_partitions_are_whole_numbers_or_text() -> None:
    paths = [
        "/a/day=1/lang=en/x.parquet",
        "/a/day=-20/lang=a%20b/y.parquet",
        "s3://b/day=__HIVE_DEFAULT_PARTITION__/hour=01/z=?.parquet",
        "/a/plain/x=1.parquet",
    ]
    found = partitions(paths)
    kinds = {field.name: field.type for field in found}
    assert kinds == {"day": pa.int64(), "lang": pa.string(), "hour": pa.string()}
    roles = {
        OWN + "day": "day",
        CARRIED + "day": "day",
        OWN + "lang": "lang",
        CARRIED + "hour": "h",
    }
    columns = Columns(roles=roles, id_type=pa.string(), partitions=found)
    table = pa.table({OWN + "url": ["u", "v"]})

    def values(path: str) -> dict[str, Any]:
        return with_partitions(table, path, columns).drop_columns([OWN + "url"]).to_pydict()

    assert values(paths[0]) == {".day": [1, 1], "=day": [1, 1], ".lang": ["en", "en"]}
    assert values(paths[1])[".lang"] == ["a b", "a b"]
    assert values(paths[2]) == {"=hour": ["01", "01"]} and values(paths[3]) == {}
    (whole,) = with_fields([schema(day=pa.string())], paths[:1], found)
    assert whole.names == ["day", "lang"]
    own = pa.table({OWN + "day": ["of the file"]})
    assert with_partitions(own, paths[0], columns)[".day"].to_pylist() == ["of the file"]


def test_columns_go_along_through_a_plan(tmp_path: Path) -> None:
    kinds = schema(image=pa.binary(), url=pa.string(), seed=pa.int32())
    rows = [{"image": b"", "url": "u", "seed": 3}]
    for day in (1, 2):
        write_shard(tmp_path / f"in/day={day}/x.parquet", rows, kinds)
    said: list[str] = []
    config = made_of(
        input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), keep_columns=("all",),
        prompt_template="{url} of day {day}",
    )  # fmt: skip
    made = plan(config, config.input.input, say=said.append)
    assert made.columns.kept.equals(schema(url=pa.string(), seed=pa.int32(), day=pa.int64()))
    assert made.columns.roles == {
        "image": "image", ".url": "url", ".day": "day",
        "=url": "url", "=seed": "seed", "=day": "day",
    }  # fmt: skip
    again = Columns.from_bytes(made.columns.to_bytes())
    assert again == made.columns and again.kept.field("day").metadata == {b"column": b"day"}
    read = pa.table({"=url": ["u"], "=day": [2], ".url": ["u"]})
    assert again.carried(read).to_pylist() == [{"url": "u", "seed": None, "day": 2}]
    with pytest.raises(UserError, match="--prompt-template: no column 'hour'; it has image, url"):
        plan(config.replace(prompt_template="{hour}"), config.input.input)


def test_what_goes_along_stands_beside_each_answer(tmp_path: Path) -> None:
    columns = pa.schema([pa.field("url", pa.string()), pa.field("at", pa.timestamp("ns"))])
    sink = Sink(output=str(tmp_path), run_id="r", id_type=pa.string(), kept=columns, settings=2)
    unit = Unit(0, 10, 13)
    rows = [
        {**row, "prompt_number": prompt, "setting": setting}
        for row in answered(unit)
        for prompt in range(2)
        for setting in range(2)
    ]
    carried = pa.table({"url": ["a", None, "c"], "at": [1, 2, None]}, schema=columns)
    parts = [Totals(rows=6, inputs=3), Totals(rows=6)]
    sink.commit(unit, rows, [STATS] * 2, parts, print, carried)
    table = pq.read_table(tmp_path / "rows" / unit.name)
    assert table.schema.names[-3:] == ["setting", "url", "at"]
    assert table["url"].to_pylist() == ["a"] * 4 + [None] * 4 + ["c"] * 4
    assert table["at"].cast(pa.int64()).to_pylist() == [1] * 4 + [2] * 4 + [None] * 4


def test_a_shard_has_its_partitions_where_it_lies() -> None:
    shard = Shard(number=0, path="s3://b/d=1/x.parquet?region=eu", size=1, rows=1, row_groups=(1,))
    assert partitions([shard.path]).names == ["d"]


def test_columns_that_come_twice() -> None:
    twice = pa.schema([("url", pa.string()), ("a", pa.int64()), ("url", pa.string())])
    with pytest.raises(UserError, match=r"s1\.parquet: 2 columns are called 'url'"):
        kept(("url",), schema(url=pa.string()), twice)
    with pytest.raises(UserError, match=r"s0\.parquet: 2 columns are called 'url'"):
        kept(("all",), twice)
    assert kept(("a",), twice)[0].names == ["a"]
    with pytest.raises(UserError, match="x: 2 columns are called 'url'"):
        of_template(PromptTemplate("{url} {a}"), [twice], ["x"])
