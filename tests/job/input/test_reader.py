"""Units out of shards: the right rows, the right columns, bytes untouched, and what goes wrong."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import read_unit, reader_of, write_shard
from trio.job.input import reader as reader_module
from trio.job.input import shard_rows
from trio.job.input.columns import Columns, resolve
from trio.job.input.manifest import Manifest, Shard, inspect
from trio.job.input.reader import TRIES, RunReader, ShardGone, ShardUnreadable
from trio.job.input.units import Unit, units

SCHEMA = pa.schema(
    [
        ("key", pa.int64()),
        ("heavy", pa.binary()),
        ("jpg", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.dictionary(pa.int32(), pa.string())),
    ]
)


def row(index: int) -> dict[str, Any]:
    image = {"bytes": bytes([index % 256]) * 50, "path": f"{index}.jpg"}
    return {"key": index, "heavy": b"x" * 1000, "jpg": image, "text": f"text {index % 3}"}


def shard(tmp_path: Path, rows: int, row_group: int) -> tuple[Manifest, Columns]:
    write_shard(tmp_path / "a.parquet", [row(i) for i in range(rows)], SCHEMA, row_group)
    manifest, schemas = inspect([str(tmp_path)])
    mapping = {"image": "jpg", "prompt": "text", "id": "key"}
    return manifest, resolve(schemas, ["a"], mapping, prompt_given=False)


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row groups from which rows were decoded, in order."""
    touched: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, row_groups: list[int], **kwargs: Any) -> Any:
        touched.extend(row_groups)
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    return touched


@pytest.mark.parametrize("row_group", [1, 7, 20, 300, 1000])
@pytest.mark.parametrize("size", [3, 20, 150])
def test_units_hold_their_rows_and_groups_are_read_once(
    tmp_path: Path, row_group: int, size: int, groups_read: list[int]
) -> None:
    manifest, columns = shard(tmp_path, 310, row_group)
    seen: list[int] = []
    reader = reader_of(manifest, columns)
    for unit in units(manifest, size):
        table = reader.read(unit)
        assert isinstance(table, pa.Table)
        keys = table.column("id").to_pylist()
        assert keys == list(range(unit.start, unit.stop))
        assert table.column("image").to_pylist() == [row(k)["jpg"] for k in keys]
        assert table.column("prompt").to_pylist() == [row(k)["text"] for k in keys]
        assert set(table.column_names) == {"id", "image", "prompt"}
        seen += keys
    assert seen == list(range(310))
    assert groups_read == list(range(-(-310 // row_group)))


def test_one_column_may_serve_as_image_and_id(tmp_path: Path) -> None:
    schema = pa.schema([("path", pa.string()), ("text", pa.string())])
    rows = [{"path": f"{i}.png", "text": f"t{i}"} for i in range(4)]
    write_shard(tmp_path / "a.parquet", rows, schema)
    manifest, schemas = inspect([str(tmp_path)])
    mapping = {"id": "path", "image": "path", "prompt": "text", "answers": "text"}
    columns = resolve(schemas, ["a"], mapping, prompt_given=False, scored=True)
    table = read_unit(manifest, columns, Unit(0, 0, 4))
    assert table.column("image").to_pylist() == [f"{i}.png" for i in range(4)]
    assert table.column("id") == table.column("image")
    assert table.column("prompt").to_pylist() == [f"t{i}" for i in range(4)]
    assert table.column("answers") == table.column("prompt")


def test_gaps_steps_back_and_other_shards(tmp_path: Path, groups_read: list[int]) -> None:
    _, columns = shard(tmp_path, 100, 10)
    write_shard(tmp_path / "b.parquet", [row(i) for i in range(100)], SCHEMA, 10)
    manifest, _ = inspect([str(tmp_path)])
    reader = reader_of(manifest, columns)
    wanted = [(25, 31), (33, 36), (80, 90), (36, 40), (2, 5), (0, 1)]
    for number, (start, stop) in [(n, each) for n in (0, 1) for each in wanted]:
        table = reader.read(Unit(number, start, stop))
        assert isinstance(table, pa.Table)
        assert table.column("id").to_pylist() == list(range(start, stop))
    assert groups_read == [2, 3, 8, 3, 0, 0] * 2


def test_a_large_row_group_is_not_held_whole(tmp_path: Path) -> None:
    """One group of 128 MB; reading its first rows takes a small part of that."""
    schema = pa.schema([("image", pa.binary()), ("prompt", pa.string())])
    rows = [{"image": bytes([i]) * (1 << 20), "prompt": "x"} for i in range(128)]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        tmp_path / "a.parquet",
        compression=None,
        use_dictionary=False,
        write_batch_size=4,
    )
    manifest, schemas = inspect([str(tmp_path)])
    columns = resolve(schemas, ["a"], {}, prompt_given=False)
    reader, before = reader_of(manifest, columns), pa.total_allocated_bytes()
    for start in range(0, 32, 4):
        table = reader.read(Unit(0, start, start + 4))
        assert isinstance(table, pa.Table)
        assert table.column("image")[0].as_py() == bytes([start]) * (1 << 20)
        del table
        assert pa.total_allocated_bytes() - before < 48 << 20


def blobs(data: list[bytes]) -> dict[str, pa.Array]:
    """The same images in columns of several types."""
    flat, names = pa.array(data), pa.array(["x"] * len(data))
    coded = pa.concat_arrays([pa.array([each]) for each in data]).dictionary_encode()
    ends = list(range(len(data) + 1))
    large = flat.cast(pa.large_binary())
    return {
        "flat": flat,
        "struct": pa.StructArray.from_arrays([flat, names], ["bytes", "path"]),
        "list": pa.ListArray.from_arrays(ends, flat),
        "large": pa.StructArray.from_arrays([large, names], ["bytes", "path"]),
        "view": flat.cast(pa.binary_view()),
        "dictionary": coded,
        "dictionary in a struct": pa.StructArray.from_arrays([coded, names], ["bytes", "path"]),
        "dictionary in a list": pa.ListArray.from_arrays(ends, coded),
    }


@pytest.mark.parametrize("kind", list(blobs([b"x"])))
def test_images_that_compression_makes_small_are_held_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """64 images of 1 MB in a file of a few kB; the text beside them is a dictionary too."""
    monkeypatch.setattr(shard_rows, "BATCH_BYTES", 4 << 20)
    data = [i.to_bytes(2, "little") + bytes((1 << 20) - 2) for i in range(64)]
    text = pa.array([f"text {i % 3}" for i in range(64)]).dictionary_encode()
    table = pa.table({"image": blobs(data)[kind], "prompt": text, "id": text})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_batch_size=1)
    del table
    manifest, schemas = inspect([str(path)])
    assert manifest.size < 1 << 20
    columns = resolve(schemas, ["a"], {}, prompt_given=False)
    units_of, before = reader_of(manifest, columns), pa.total_allocated_bytes()
    for start in range(64):
        found = units_of.read(Unit(0, start, start + 1))
        assert isinstance(found, pa.Table)
        used = pa.total_allocated_bytes() - before
        cell = found.column("image")[0].as_py()
        cell = cell[0] if isinstance(cell, list) else cell
        assert (cell["bytes"] if isinstance(cell, dict) else cell) == data[start]
        assert found.column("id")[0].as_py() == f"text {start % 3}"
        assert used < 24 << 20


class Tried:
    """A reader that notes the faults after which it tries again."""

    def __init__(self, manifest: Manifest, columns: Columns) -> None:
        self.faults: list[tuple[int, ShardUnreadable]] = []
        shards = {each.number: each for each in manifest.shards}
        self.reader = RunReader(shards, columns.roles, self.again)

    def again(self, shard: Shard, tried: int, fault: ShardUnreadable) -> None:
        self.faults.append((tried, fault))

    def tries(self, unit: Unit) -> tuple[pa.Table | ShardUnreadable, int]:
        """The rows or why not, and how often it was tried."""
        self.faults = []
        return self.reader.read(unit), len(self.faults) + 1


@pytest.mark.parametrize("row_group", [7, 10])
def test_a_shard_that_changed_or_went_is_tried_three_times_and_then_once_a_unit(
    tmp_path: Path, row_group: int
) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    write_shard(tmp_path / "a.parquet", [row(i + 1) for i in range(20)], SCHEMA, row_group)
    reader = Tried(manifest, columns)
    for start, tries in ((0, TRIES), (5, 1)):
        found, tried = reader.tries(Unit(0, start, start + 5))
        assert isinstance(found, ShardUnreadable)
        assert (found.kind, tried) == ("shard_changed", tries)
        assert "a.parquet: the shard has changed since" in str(found)
    (tmp_path / "a.parquet").unlink()
    reader = Tried(manifest, columns)
    for start, tries in ((0, TRIES), (5, 1)):
        found, tried = reader.tries(Unit(0, start, start + 5))
        assert isinstance(found, ShardGone) and (found.kind, tried) == ("shard_gone", tries)
        assert all(isinstance(fault, ShardGone) for _, fault in reader.faults)


def test_a_shard_that_comes_back_is_read_on(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    path, away = tmp_path / "a.parquet", tmp_path / "away"
    path.rename(away)

    def back(shard: Shard, tried: int, fault: ShardUnreadable) -> None:
        away.rename(path)

    again = RunReader({0: manifest.shards[0]}, columns.roles, back)
    for start in (0, 10):
        found = again.read(Unit(0, start, start + 10))
        assert isinstance(found, pa.Table)
        assert found.column("id").to_pylist() == list(range(start, start + 10))


def test_a_broken_page_spoils_its_own_row_group_only(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    path = tmp_path / "a.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    at = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    reader = Tried(manifest, columns)
    for start in (0, 5):
        found, tried = reader.tries(Unit(0, start, start + 5))
        assert isinstance(found, ShardUnreadable)
        assert (found.kind, tried) == ("shard_unreadable", TRIES)
        assert str(found).startswith(f"{path}: ") and "\n" not in str(found)
    found, tried = reader.tries(Unit(0, 10, 20))
    assert isinstance(found, pa.Table) and tried == 1
    assert found.column("id").to_pylist() == list(range(10, 20))


def test_what_is_no_fault_of_a_shard_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, columns = shard(tmp_path, 20, 10)

    def broken(*args: Any) -> Any:
        raise TypeError("a mistake of this package")

    monkeypatch.setattr(reader_module, "group_of", broken)
    with pytest.raises(TypeError, match="a mistake"):
        reader_of(manifest, columns).read(Unit(0, 0, 5))
