"""Units out of shards: the right rows, the right columns, bytes untouched."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import write_shard
from trio.job.input import reader
from trio.job.input.columns import Columns, resolve
from trio.job.input.manifest import Manifest, inspect
from trio.job.input.reader import ShardChanged, ShardGone, ShardUnreadable, UnitReader
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
    reader = UnitReader(columns)
    for turn, unit in enumerate(units(manifest, size)):
        table = reader.read(manifest.shards[0], unit, turn)
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
    columns = resolve(schemas, ["a"], mapping, prompt_given=False)
    table = UnitReader(columns).read(manifest.shards[0], Unit(0, 0, 4))
    assert table.column("image").to_pylist() == [f"{i}.png" for i in range(4)]
    assert table.column("id") == table.column("image")
    assert table.column("prompt").to_pylist() == [f"t{i}" for i in range(4)]
    assert table.column("answers") == table.column("prompt")


def test_gaps_and_steps_back(tmp_path: Path, groups_read: list[int]) -> None:
    manifest, columns = shard(tmp_path, 100, 10)
    reader = UnitReader(columns)
    for start, stop in [(25, 31), (33, 36), (80, 90), (36, 40), (2, 5), (0, 1)]:
        table = reader.read(manifest.shards[0], Unit(0, start, stop))
        assert table.column("id").to_pylist() == list(range(start, stop))
    assert groups_read == [2, 3, 8, 0, 0]


def test_threads_read_in_the_order_of_their_turns(tmp_path: Path, groups_read: list[int]) -> None:
    manifest, columns = shard(tmp_path, 400, 100)
    wanted = list(units(manifest, 10))
    reader = UnitReader(columns)

    def read(turn: int) -> list[int]:
        table = reader.read(manifest.shards[0], wanted[turn], turn)
        return list(table.column("id").to_pylist())

    with ThreadPoolExecutor(len(wanted)) as pool:
        tables = list(pool.map(read, reversed(range(len(wanted)))))
    assert [key for keys in reversed(tables) for key in keys] == list(range(400))
    assert groups_read == [0, 1, 2, 3]


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
    reader, before = UnitReader(columns), pa.total_allocated_bytes()
    for start in range(0, 32, 4):
        table = reader.read(manifest.shards[0], Unit(0, start, start + 4))
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
    monkeypatch.setattr(reader, "BATCH_BYTES", 4 << 20)
    data = [i.to_bytes(2, "little") + bytes((1 << 20) - 2) for i in range(64)]
    text = pa.array([f"text {i % 3}" for i in range(64)]).dictionary_encode()
    table = pa.table({"image": blobs(data)[kind], "prompt": text, "id": text})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_batch_size=1)
    del table
    manifest, schemas = inspect([str(path)])
    assert manifest.size < 1 << 20
    columns = resolve(schemas, ["a"], {}, prompt_given=False)
    units_of, before = UnitReader(columns), pa.total_allocated_bytes()
    for start in range(64):
        found = units_of.read(manifest.shards[0], Unit(0, start, start + 1))
        used = pa.total_allocated_bytes() - before
        cell = found.column("image")[0].as_py()
        cell = cell[0] if isinstance(cell, list) else cell
        assert (cell["bytes"] if isinstance(cell, dict) else cell) == data[start]
        assert found.column("id")[0].as_py() == f"text {start % 3}"
        assert used < 24 << 20


@pytest.mark.parametrize("row_group", [7, 10])
def test_a_shard_that_changed_or_went_is_noticed(tmp_path: Path, row_group: int) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    write_shard(tmp_path / "a.parquet", [row(i + 1) for i in range(20)], SCHEMA, row_group)
    reader = UnitReader(columns)
    for _ in range(2):
        with pytest.raises(ShardChanged, match="has changed since"):
            reader.read(manifest.shards[0], Unit(0, 0, 5))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ShardGone, match="is gone since"):
        reader.read(manifest.shards[0], Unit(0, 0, 5))


def test_a_broken_page_spoils_its_own_row_group_only(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    path = tmp_path / "a.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    at = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    reader = UnitReader(columns)
    for turn in range(2):
        with pytest.raises(ShardUnreadable, match=r"a\.parquet: "):
            reader.read(manifest.shards[0], Unit(0, 0, 10), turn)
    table = reader.read(manifest.shards[0], Unit(0, 10, 20), 2)
    assert table.column("id").to_pylist() == list(range(10, 20))
