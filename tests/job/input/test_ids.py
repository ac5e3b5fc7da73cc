"""Ids that come more than once."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import ID_TYPES, id_values, read_unit, write_shard
from trio.engine.request import Sampling
from trio.errors import UserError
from trio.job.images.policy import ImagePolicy
from trio.job.input.columns import resolve
from trio.job.input.ids import IdReport, scan
from trio.job.input.manifest import Manifest, inspect
from trio.job.input.units import Unit
from trio.job.output.output_rows import RowSettings, identify, sources
from trio.job.output.schema import build_table
from trio.job.output.sink import serialise

SETTINGS = RowSettings(
    prompts=("x",), sampling=Sampling(max_new_tokens=1), policy=ImagePolicy(), seed=0
)


def shards(path: Path, kind: pa.DataType, *columns: list[Any]) -> Manifest:
    schema = pa.schema([("id", kind), ("image", pa.binary())])
    for number, ids in enumerate(columns):
        rows = [{"id": each, "image": b"x"} for each in ids]
        write_shard(path / f"{number}.parquet", rows, schema, 3)
    return inspect([str(path)])[0]


@pytest.mark.parametrize("kind", ID_TYPES)
def test_ids_of_every_type_are_counted_and_reach_the_output(
    tmp_path: Path, kind: pa.DataType
) -> None:
    values = id_values(kind)
    column = pa.chunked_array([values, values])
    table = pa.table({"id": column, "image": [b"x"] * 6})
    pq.write_table(table, tmp_path / "0.parquet")
    manifest, schemas = inspect([str(tmp_path)])
    found = scan(manifest, "id")
    assert (found.duplicates, found.nulls) == (2, 2) and len(found.examples) == 2
    columns = resolve(schemas, ["0"], {}, prompt_given=True)
    assert columns.id_type == kind
    unit = Unit(0, 0, 6)
    read = sources(read_unit(manifest, columns, unit), unit, "0")
    for source in read:
        identify(source, SETTINGS)
    rows = [{"row": source.key, "id": source.id} for source in read]
    schema = pa.schema([("row", pa.int64()), ("id", columns.id_type)])
    written = pq.read_table(pa.BufferReader(serialise(build_table(rows, schema))))
    assert written.column("id").type == kind and written.column("id").equals(column)


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_what_comes_twice_is_counted_and_named(tmp_path: Path, kind: pa.DataType) -> None:
    manifest = shards(tmp_path, kind, ["a", "b", None, "a"], [], ["c", None, "b", "b", "d"])
    found = scan(manifest, "id")
    assert (found.rows, found.complete, found.duplicates, found.nulls) == (9, True, 3, 2)
    assert found.examples == ("'a'", "'b'")
    assert found.warning is not None
    assert "3 rows have an id that an earlier row has ('a', 'b')" in found.warning
    assert "2 rows have no id" in found.warning and "\n" not in found.warning
    assert IdReport.from_json(found.to_json()) == found


def test_shards_of_different_types_are_compared(tmp_path: Path) -> None:
    kinds: list[tuple[pa.DataType, pa.DataType, list[Any]]] = [
        (pa.string(), pa.large_string(), ["a", "b"]),
        (pa.binary(2), pa.binary(), [b"ab", b"cd"]),
        (pa.int8(), pa.uint32(), [1, 2]),
        (pa.uint16(), pa.uint64(), [1, 2]),
    ]
    for number, (one, other, values) in enumerate(kinds):
        for shard, kind in enumerate((one, pa.null(), other)):
            ids = pa.nulls(2) if pa.types.is_null(kind) else pa.array(values, kind)
            path = tmp_path / f"{number}" / f"{shard}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({"id": ids, "image": [b"x"] * 2}), path)
        found = scan(inspect([str(tmp_path / f"{number}")])[0], "id")
        assert (found.duplicates, found.nulls) == (2, 2)
        assert found.examples == tuple(map(repr, values))


def test_at_most_five_examples(tmp_path: Path) -> None:
    found = scan(shards(tmp_path, pa.int64(), [*range(7)] * 3), "id")
    assert found.duplicates == 14 and len(found.examples) == 5


def test_all_different(tmp_path: Path) -> None:
    found = scan(shards(tmp_path, pa.int64(), list(range(10)), list(range(10, 30))), "id")
    assert found == IdReport(rows=30, complete=True, duplicates=0, nulls=0, examples=())
    assert found.warning is None


def test_a_scan_that_is_cut_short_says_so(tmp_path: Path) -> None:
    manifest = shards(tmp_path, pa.int64(), [1, 2, 3, 4], [1, 5, 6, 1], [1, 1, 1, 1])
    found = scan(manifest, "id", most_rows=6)
    assert (found.rows, found.complete, found.duplicates) == (6, False, 1)
    assert found.warning is not None and "among the first 6" in found.warning
    assert scan(manifest, "id", most_s=0.0).rows == 4
    limited = scan(manifest, "id", limit=5)
    assert (limited.rows, limited.complete, limited.duplicates) == (5, True, 1)


def test_a_column_of_nulls(tmp_path: Path) -> None:
    found = scan(shards(tmp_path, pa.null(), [None, None]), "id")
    assert (found.duplicates, found.nulls) == (0, 2)


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    manifest = shards(tmp_path, pa.int64(), [1])
    (tmp_path / "0.parquet").write_text("gone")
    with pytest.raises(UserError, match=r"0\.parquet: column 'id' cannot be read"):
        scan(manifest, "id")


def test_arrow_shards_without_rows(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string())])
    for name, ids in (("a", []), ("b", ["x", "x"]), ("c", [])):
        with pa.ipc.new_stream(tmp_path / f"{name}.arrow", schema) as stream:
            if ids:
                stream.write_batch(pa.RecordBatch.from_pydict({"id": ids}, schema))
    found = scan(inspect([str(tmp_path)], say=lambda _: None)[0], "id")
    assert (found.rows, found.duplicates, found.complete) == (2, 1, True)
