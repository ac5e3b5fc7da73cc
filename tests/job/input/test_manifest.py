"""Input expansion and the pinned listing."""

import dataclasses
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import write_shard
from trio.errors import UserError
from trio.job.input.manifest import COMPACT, Manifest, Shard, expand, inspect
from trio.job.input.units import unit_rows
from trio.job.output.sink import serialise
from trio.job.storage import locate

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
    shard(tmp_path / "a.parquet", 5, row_group=2)
    shard(tmp_path / "b.parquet", 0)
    shard(tmp_path / "c.parquet", 5, row_group=2)
    manifest, schemas = inspect([str(tmp_path)])
    assert manifest.rows == 10 and schemas[0] is schemas[2]
    back = Manifest.from_table(manifest.to_table())
    assert back == manifest
    assert back.shards[0].row_groups is back.shards[2].row_groups


def test_a_listing_is_compared_and_what_changed_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "a.parquet", 5)
    before, _ = inspect([str(tmp_path)])
    assert before.difference(expand([str(tmp_path)])) is None
    (tmp_path / "a.parquet").unlink()
    path = shard(tmp_path / "a.parquet", 60, row_group=2)
    difference = before.difference(expand([str(tmp_path)]))
    assert difference == f"{path} had {before.size} bytes, has {path.stat().st_size}"
    path.rename(tmp_path / "c.parquet")
    assert "c.parquet" in str(before.difference(expand([str(tmp_path)])))
    shard(tmp_path / "b.parquet", 1)
    assert "1 shard then, 2 now" in str(before.difference(expand([str(tmp_path)])))


def planned(count: int, seed: int) -> Manifest:
    """Shards of 10,000 rows with names of 106 letters, each cut into 100 unequal row groups."""
    rng = random.Random(seed)
    base = "s3://a-bucket-of-some-team/datasets/captions/v3/images-of-the-web/part"
    shards = [
        Shard(
            number=i,
            path=f"{base}-{i // 1000:03d}/{rng.getrandbits(64):016x}-{i:06d}.parquet",
            size=rng.randint(10**9, 2 * 10**9),
            rows=10_000,
            row_groups=tuple(rng.randint(80, 120) for _ in range(100)),
        )
        for i in range(count)
    ]
    assert len(shards[0].path) == 106
    return Manifest(shards=tuple(shards))


def test_what_a_shard_costs_in_the_manifest() -> None:
    """README of job/: 100 bytes on disk, and 1.5 kB of a driver's memory, at most."""
    count = 2000
    buffer = serialise(planned(count, 1).to_table(), **COMPACT)
    assert buffer.size / count < 100
    table = pq.read_table(pa.BufferReader(buffer))
    tracemalloc.start()
    manifest = Manifest.from_table(table)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.rows == 10_000 * count and used / count < 1500


CAPITALS = ["a.parquet", "B.PARQUET", "c.Pq", "d.parq", "e.snappy.parquet"]
EXPORTS = ["part-000", "000000_0", "x.parquet.gzip", "é día.PARQUET.snappy"]
HIDDEN = ["._a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet", "_temporary/0/a.parquet",
          "_delta_log/1.checkpoint.parquet", "b/.a.parquet.crc", "b/_SUCCESS"]  # fmt: skip
COMPANIONS = ["README.md", "dataset_info.json", "b/1.jpg", "b/LICENSE"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*", "*"])
def test_shards_by_suffix_and_nothing_left_out_in_silence(tmp_path: Path, pattern: str) -> None:
    taken = [*CAPITALS, *EXPORTS]
    for name in (*taken, *HIDDEN, "copy.parquet.bak"):
        shard(tmp_path / name, 1)
    for name in (*COMPANIONS, "rows.csv", "no-suffix", "z.parquet.gz", "it.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no shard")
    said: list[str] = []
    found = expand([str(tmp_path / pattern)], say=said.append)
    assert [Path(one.location.path).name for one in found] == sorted(taken)
    (line,) = said
    images = "" if pattern == "*" else ", 1 image file"
    assert f"Parquet files are read; left out: 2 JSONL or CSV files{images}, 3 files" in line
    assert "of other kinds (copy.parquet.bak, no-suffix, z.parquet.gz)" in line
    assert "\n" not in line


def test_a_file_named_in_full_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in (".hidden/x.parquet", "_x.parquet", "rows.dat"):
        path = shard(tmp_path / name, 1)
        said: list[str] = []
        (one,) = expand([str(path)], say=said.append)
        assert one.location.path == str(path) and one.kind == "Parquet"
        assert said == []


def test_partitions_with_an_underscore_are_not_hidden(tmp_path: Path) -> None:
    for name in ("_day=1/a.parquet", "_day=2/_tmp/a.parquet", "_day=2/b=_x/_c=.y/a.parquet"):
        shard(tmp_path / name, 1)
    found = [str(Path(one.location.path).relative_to(tmp_path)) for one in expand([str(tmp_path)])]
    assert found == ["_day=1/a.parquet", "_day=2/b=_x/_c=.y/a.parquet"]


def test_options_are_no_part_of_what_shards_are_called() -> None:
    uris = [f"s3://b/{day}/a.parquet?tls_ca_file_path=/etc/{day}" for day in "12"]
    shards = [Shard(number=0, path=uri, size=1, rows=1, row_groups=(1,)) for uri in uris]
    assert Manifest(shards=tuple(shards)).shared_directory() == "s3://b/"
    assert Manifest(shards=tuple(shards[:1])).shared_directory() is None


def test_only_files_that_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("no shard")
    with pytest.raises(UserError, match=r"no input there: left out: 1 file .*\(a\.heic\)"):
        inspect([str(tmp_path)])


def test_units_are_cut_by_what_rows_take_unpacked(tmp_path: Path) -> None:
    """A shard of 64 MB of zeros that compression leaves nothing of."""
    rows = [{"image": bytes(1 << 20)}] * 64
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    manifest, _ = inspect([str(tmp_path)])
    assert manifest.size < 1 << 20 and 64 << 20 <= manifest.unpacked < 65 << 20
    whole = dataclasses.replace(manifest.shards[0], unpacked=manifest.unpacked * 1000)
    assert unit_rows(Manifest(shards=(whole,)), actors=1) == 1


@pytest.mark.parametrize("name", ["missing", "missing.parquet", "missing-*.parquet", "empty"])
def test_inputs_that_name_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no input there; give files of Parquet, WebDataset tars"):
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
