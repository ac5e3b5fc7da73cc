"""Shards at the edges of the format: nested columns beyond 2 GB, row groups of 1 and of 100,000."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import reader_of
from trio.job.input.columns import resolve
from trio.job.input.manifest import inspect
from trio.job.input.units import unit_rows, units

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def sizes(path: Path, rows_per_unit: int | None = None) -> list[int]:
    """Bytes of the first image of each unit, every row of the shard having been read."""
    manifest, schemas = inspect([str(path)])
    columns = resolve(schemas, [str(path)], {}, prompt_given=True)
    reader, out, rows = reader_of(manifest, columns), [], 0
    for unit in units(manifest, rows_per_unit or unit_rows(manifest, actors=1)):
        table = reader.read(unit)
        assert isinstance(table, pa.Table) and table.num_rows == unit.stop - unit.start
        rows += table.num_rows
        out.append(len(table.column("image")[0].as_py()[0]["bytes"]))
    assert rows == manifest.rows
    return out


@pytest.mark.slow
def test_a_nested_column_of_more_than_2_gb_in_one_row_group(tmp_path: Path) -> None:
    image = [{"bytes": bytes(20 << 20), "path": None}]
    batch = pa.RecordBatch.from_arrays([pa.array([image], pa.list_(IMAGE))], ["image"])
    table = pa.Table.from_batches([batch] * 110)
    assert table.nbytes > 2 << 30
    path = tmp_path / "big.parquet"
    pq.write_table(table, path, row_group_size=10**6, compression="zstd", use_dictionary=False)
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    before = pa.total_allocated_bytes()
    assert sizes(path) == [20 << 20] * 110
    assert pa.total_allocated_bytes() - before < 512 << 20


def test_a_hundred_thousand_rows_in_one_group_and_one_row_in_each(tmp_path: Path) -> None:
    for rows, row_group in ((100_000, 100_000), (1_000, 1)):
        cells = [[{"bytes": b"x" * (n % 50), "path": None}] for n in range(rows)]
        table = pa.table({"image": pa.array(cells, pa.list_(IMAGE))})
        path = tmp_path / f"{row_group}.parquet"
        pq.write_table(table, path, row_group_size=row_group)
        assert pq.ParquetFile(path).metadata.num_row_groups == rows // row_group
        assert sizes(path, 100) == [0] * (rows // 100)
