"""Indexes over several shards: one type a column, the rows again, and what was read for them."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.input.kinds.input_samples import (
    facts_of,
    members_of,
    picture,
    write_images,
    write_img2dataset,
    write_jsonl,
    write_tar,
)
from trio.errors import UserError
from trio.job.input import ids
from trio.job.input.columns import resolve
from trio.job.input.manifest import Manifest, inspect
from trio.job.input.reader import RunReader
from trio.job.input.shard_rows import ShardChanged, ShardGone
from trio.job.input.units import Unit, units


def planned(*inputs: Path, prompt: str = "none") -> tuple[Manifest, RunReader, list[str]]:
    """Manifest, a reader that tries again without a word, and what was said."""
    said: list[str] = []
    manifest, schemas = inspect([str(one) for one in inputs], say=said.append)
    paths = [shard.path for shard in manifest.shards]
    columns = resolve(schemas, paths, {"prompt": prompt}, prompt_given=True)
    shards = {shard.number: shard for shard in manifest.shards}
    return manifest, RunReader(shards, columns.roles, lambda *_: None), said


def read(reader: RunReader, unit: Unit) -> pa.Table:
    table = reader.read(unit)
    assert isinstance(table, pa.Table), table
    return table


def test_tars_give_their_rows_and_columns(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, rows=150)
    manifest, reader, said = planned(tmp_path, prompt="txt")
    assert manifest.rows == 300 and "index: 2 tar shards" in said[-1]
    numbers: list[int] = []
    for unit in units(manifest, 40):
        table = read(reader, unit)
        assert table.column_names == ["image", "prompt", "id"]
        start = 150 * unit.shard + unit.start
        numbers += range(start, start + table.num_rows)
        made = numbers[-table.num_rows :]
        assert table.column("prompt").to_pylist() == [f"old text {n}" for n in made]
        cells = table.column("image").to_pylist()
        assert [cell[0]["bytes"] for cell in cells] == [picture(n) for n in made]
        assert table.column("id").to_pylist() == [f"{unit.shard:05d}.tar/{n:09d}" for n in made]
    assert numbers == list(range(300))
    assert ids.scan(manifest, "id").rows == 300


def test_columns_of_json_have_one_type_over_all_shards(tmp_path: Path) -> None:
    jpg = picture(0)
    objects: list[list[dict[str, Any]]] = [
        [{"width": 3, "tags": ["a"], "score": 1}, {"only": True}],
        [{"width": "3 px", "score": 0.5}, {"id": "mine"}],
    ]
    for number, some in enumerate(objects):
        members = [
            member
            for n, one in enumerate(some)
            for member in ((f"{n}.jpg", jpg), (f"{n}.json", json.dumps(one).encode()))
        ]
        write_tar(tmp_path / f"{number}.tar", [*members, ("z.jpg", jpg), ("z.json", b"[1]")])
    said: list[str] = []
    manifest, schemas = inspect([str(tmp_path)], say=said.append)
    assert schemas[0] == schemas[1]
    kinds = {field.name: field.type for field in schemas[0]}
    assert kinds.keys() == {
        "id",
        "image",
        *(f"json.{n}" for n in ("width", "tags", "score", "only", "id")),
    }
    assert kinds["json.score"] == pa.float64() and kinds["json.only"] == pa.bool_()
    assert said[1] == "index: values of several types, taken as text: width"
    assert said[2].startswith("index: JSON texts that are no object, whose columns are null: 2")
    table = pq.read_table(manifest.shards[0].index)
    assert table.column("json.width").to_pylist() == ["3", None, None]
    assert table.column("json.tags").to_pylist() == ['["a"]', None, None]


def test_json_of_too_many_fields_stays_text(tmp_path: Path) -> None:
    text = json.dumps({f"k{n}": n for n in range(201)})
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.json", text.encode())])
    said: list[str] = []
    manifest, schemas = inspect([str(tmp_path)], say=said.append)
    assert (
        schemas[0].names == ["id", "image", "json"] and "JSON of more than 200 different" in said[1]
    )
    assert pq.read_table(manifest.shards[0].index).column("json").to_pylist() == [text]


def test_ids_tell_tars_of_one_name_apart(tmp_path: Path) -> None:
    for folder in "ab":
        write_tar(tmp_path / folder / "0.tar", members_of([1]))
    manifest, reader, _ = planned(tmp_path)
    found = [read(reader, unit).column("id").to_pylist() for unit in units(manifest, 9)]
    assert found == [["a/0.tar/000000001"], ["b/0.tar/000000001"]]


def test_a_cut_tar_gives_rows_and_one_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", members_of(range(5)))
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000003.json").offset_data + 9
    path.write_bytes(path.read_bytes()[:cut])
    manifest, reader, _ = planned(tmp_path)
    assert manifest.rows == 4 and "prepared" not in read(reader, Unit(0, 0, 3)).column_names
    table = read(reader, Unit(0, 0, 4))
    errors = table.column("prepared").to_pylist()
    assert errors[:3] == [None] * 3 and errors[3]["kind"] == "shard_cut"
    assert table.column("id").to_pylist()[3] == "0.tar/000000003"


def test_a_tar_that_is_changed_or_gone_since(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", members_of(range(5)))
    _, reader, _ = planned(tmp_path)
    write_tar(path, members_of(range(60)))
    assert isinstance(reader.read(Unit(0, 0, 2)), ShardChanged)
    path.unlink()
    assert isinstance(reader.read(Unit(0, 0, 2)), ShardGone)


def test_an_index_that_is_gone(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of(range(5)))
    manifest, reader, _ = planned(tmp_path)
    Path(manifest.shards[0].index).unlink()
    found = reader.read(Unit(0, 0, 2))
    assert isinstance(found, ShardGone) and "000000.parquet, its index, is gone" in str(found)


def test_shards_behind_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    for number in range(7):
        write_tar(tmp_path / f"{number}.tar", members_of(range(5)))
    (tmp_path / "5.tar").write_text("no tar")
    said: list[str] = []
    manifest, schemas = inspect([str(tmp_path)], say=said.append, limit=12)
    assert [shard.rows for shard in manifest.shards] == [5, 5, 5, 0, 0, 0, 0]
    assert said[0] == "index: the first 3 shards hold --limit 12 rows"
    assert len(set(map(id, schemas))) == 1 and manifest.unpacked == 3 * manifest.shards[0].size
    assert sum(unit.stop - unit.start for unit in units(manifest, 3, 12)) == 12
    with pytest.raises(UserError, match=r"5\.tar: not a readable tar"):
        inspect([str(tmp_path)], say=said.append, limit=16)


def test_what_is_no_tar_and_what_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("<html>" * 200)
    with pytest.raises(UserError, match=r"a\.tar: not a readable tar"):
        inspect([str(tmp_path)])
    write_tar(tmp_path / "a.tar", [])
    assert inspect([str(tmp_path)], say=lambda _: None)[0].rows == 0


def test_folders_and_tables_beside_each_other(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 3)
    rows = [{"image": f"photos/{n}.png", "json.width": str(n)} for n in range(2)]
    table = write_jsonl(tmp_path / "rows.jsonl", rows)
    manifest, reader, said = planned(tmp_path / "photos", table)
    assert "index: 1 image shard, 1 JSONL or CSV shard" in said[-1]
    made_up = read(reader, Unit(1, 0, 2)).column("id").to_pylist()
    assert made_up == ["rows.jsonl#0", "rows.jsonl#1"]
    photos = pq.read_table(manifest.shards[0].index)
    assert photos.column("json.width").to_pylist() == [facts_of(n)["width"] for n in (0, 2, 1)]
    assert manifest.shards[0].place == str(tmp_path / "photos")
    assert ids.scan(manifest, "id").duplicates == 0
