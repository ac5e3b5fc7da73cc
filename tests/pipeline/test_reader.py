"""Units out of shards: the right rows, the right columns, bytes untouched."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.pipeline.fakes import write_shard
from trio.pipeline.columns import Columns, resolve
from trio.pipeline.manifest import Manifest, inspect
from trio.pipeline.plan import Read, Unit, reads, units
from trio.pipeline.reader import BLOCK, UnitSource, blocks, decode, encode, tables

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


@pytest.mark.parametrize("row_group", [1, 7, 20, 300, 1000])
@pytest.mark.parametrize("size", [3, 20, 150])
def test_units_hold_their_rows(tmp_path: Path, row_group: int, size: int) -> None:
    manifest, columns = shard(tmp_path, 310, row_group)
    seen: list[int] = []
    for read in reads(manifest, list(units(manifest, size)), parallel=4):
        for unit, table in tables(read, columns):
            keys = table.column("id").to_pylist()
            assert keys == list(range(unit.start, unit.stop))
            assert table.column("image").to_pylist() == [row(k)["jpg"] for k in keys]
            assert table.column("prompt").to_pylist() == [row(k)["text"] for k in keys]
            assert set(table.column_names) == {"id", "image", "prompt"}
            seen += keys
    assert seen == list(range(310))


def test_one_column_may_serve_as_image_and_id(tmp_path: Path) -> None:
    schema = pa.schema([("path", pa.string()), ("text", pa.string())])
    rows = [{"path": f"{i}.png", "text": f"t{i}"} for i in range(4)]
    write_shard(tmp_path / "a.parquet", rows, schema)
    manifest, schemas = inspect([str(tmp_path)])
    mapping = {"id": "path", "image": "path", "prompt": "text", "answers": "text"}
    columns = resolve(schemas, ["a"], mapping, prompt_given=False)
    read = Read(manifest.shards[0], tuple(units(manifest, 10)))
    ((_, table),) = tables(read, columns)
    assert table.column("image").to_pylist() == [f"{i}.png" for i in range(4)]
    assert table.column("id") == table.column("image")
    assert table.column("prompt").to_pylist() == [f"t{i}" for i in range(4)]
    assert table.column("answers") == table.column("prompt")


def test_gaps_are_left_out(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 100, 30)
    wanted = (Unit(0, 10, 20), Unit(0, 40, 45), Unit(0, 95, 100))
    got = [
        (unit, table.column("id").to_pylist())
        for unit, table in tables(Read(manifest.shards[0], wanted), columns)
    ]
    assert got == [(u, list(range(u.start, u.stop))) for u in wanted]


def test_row_groups_of_other_units_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    manifest, columns = shard(tmp_path, 100, 10)
    touched: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, row_groups: list[int], **kwargs: Any) -> Any:
        touched.extend(row_groups)
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    list(tables(Read(manifest.shards[0], (Unit(0, 25, 31), Unit(0, 80, 90))), columns))
    assert touched == [2, 3, 8]


def test_a_block_is_one_row_and_gives_its_table_back(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 25, 10)
    read = Read(manifest.shards[0], tuple(units(manifest, 10)))
    made = list(blocks(read, columns))
    assert [b.num_rows for b in made] == [1, 1, 1] and made[0].schema == BLOCK
    table = decode(made[1].column("payload")[0].as_buffer())
    assert table.column("id").to_pylist() == list(range(10, 20))
    assert made[1].column("start").to_pylist() == [10]


def test_a_slice_is_encoded_without_its_neighbours() -> None:
    table = pa.table({"x": pa.array([b"a" * 1000] * 100)})
    assert encode(table.slice(50, 1)).size < 3000


def test_a_shard_that_changed_is_noticed(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    read = Read(manifest.shards[0], tuple(units(manifest, 10)))
    write_shard(tmp_path / "a.parquet", [row(i) for i in range(20)], SCHEMA, 7)
    with pytest.raises(AssertionError, match="changed under the run"):
        list(tables(read, columns))


def test_one_task_for_each_read(tmp_path: Path) -> None:
    manifest, columns = shard(tmp_path, 20, 10)
    parts = [Read(manifest.shards[0], (u,)) for u in units(manifest, 10)]
    tasks = UnitSource(parts, columns).get_read_tasks(1)
    assert len(tasks) == 2 and [b.num_rows for b in tasks[0]()] == [1]
