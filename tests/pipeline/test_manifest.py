"""Input expansion and the pinned listing."""

from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipeline.fakes import write_shard
from trio.errors import UserError
from trio.pipeline.manifest import Manifest, inspect
from trio.pipeline.storage import locate

SCHEMA = pa.schema([("image", pa.binary())])


def shard(path: Path, rows: int, row_group: int = 1000) -> Path:
    return write_shard(path, [{"image": b"x"}] * rows, SCHEMA, row_group)


def test_directory_pattern_and_file_name_the_same_shards(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet"):
        shard(tmp_path / name, 3)
    (tmp_path / "notes.txt").write_text("no shard")
    (tmp_path / "_tmp.parquet").write_text("no shard")
    whole, _ = inspect([str(tmp_path)])
    names = [Path(s.path).name for s in whole.shards]
    assert names == ["a.parquet", "b.parquet", "c.parquet"]
    assert [s.number for s in whole.shards] == [0, 1, 2]
    (tmp_path / "_tmp.parquet").unlink()
    assert inspect([str(tmp_path / "**" / "*.parquet")])[0] == whole
    one, _ = inspect([str(tmp_path / "b.parquet")])
    assert [s.path for s in one.shards] == [str(tmp_path / "b.parquet")]
    two, _ = inspect([str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")])
    assert [Path(s.path).name for s in two.shards] == ["b.parquet", "a.parquet"]


def test_sizes_rows_and_row_groups(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.parquet", 25, row_group=10)
    manifest, schemas = inspect([str(path)])
    entry = manifest.shards[0]
    assert (entry.rows, entry.row_groups) == (25, (10, 10, 5))
    assert entry.size == path.stat().st_size == manifest.size
    assert schemas[0].names == ["image"]


def test_table_gives_the_manifest_back(tmp_path: Path) -> None:
    shard(tmp_path / "a.parquet", 5)
    shard(tmp_path / "b.parquet", 0)
    manifest, _ = inspect([str(tmp_path)])
    assert Manifest.from_table(manifest.to_table()) == manifest
    assert manifest.rows == 5


def test_difference_names_what_changed(tmp_path: Path) -> None:
    shard(tmp_path / "a.parquet", 5)
    before, _ = inspect([str(tmp_path)])
    assert before.difference(before) is None
    shard(tmp_path / "a.parquet", 6)
    changed, _ = inspect([str(tmp_path)])
    difference = before.difference(changed)
    assert difference is not None and "a.parquet" in difference and "6" in difference
    shard(tmp_path / "b.parquet", 1)
    assert "1 shards then, 2 now" in str(before.difference(inspect([str(tmp_path)])[0]))


@pytest.mark.parametrize("name", ["missing", "missing.parquet", "missing-*.parquet", "empty"])
def test_inputs_that_name_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet file there"):
        inspect([str(tmp_path / name)])


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        inspect([str(tmp_path)])


def test_an_output_below_the_input_is_no_input(tmp_path: Path) -> None:
    shard(tmp_path / "a.parquet", 1)
    before, _ = inspect([str(tmp_path)])
    shard(tmp_path / "out" / "rows" / "0.parquet", 1)
    shard(tmp_path / "outside.parquet", 1)
    after, _ = inspect([str(tmp_path)], locate(str(tmp_path / "out")))
    names = [Path(s.path).name for s in after.shards]
    assert names == ["a.parquet", "outside.parquet"] and after.shards[0] == before.shards[0]


def test_a_shard_named_twice(tmp_path: Path) -> None:
    path = str(shard(tmp_path / "a.parquet", 1))
    with pytest.raises(UserError, match="twice"):
        inspect([path, str(tmp_path)])
