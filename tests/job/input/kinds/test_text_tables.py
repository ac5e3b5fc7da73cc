"""JSONL and CSV as Parquet."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.errors import UserError
from trio.job.input.kinds import text_tables
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.text_tables import write_table
from trio.job.storage import locate


def table_of(path: Path) -> pa.Table:
    out = path.parent / "out.parquet"
    write_table(Found(locate(str(path)), path.stat().st_size), path.name, out)
    return pq.read_table(out)


def of_text(folder: Path, text: str | bytes, name: str = "a.csv") -> pa.Table:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return table_of(path)


def test_types_of_csv_are_those_that_lose_nothing(tmp_path: Path) -> None:
    text = 'zip,count,share,image,text\n007,1,0.5,a.png,"two\nlines, ""quoted"""\n12,,1e3,b.png,\n'
    table = of_text(tmp_path, text)
    assert table.schema.types[:4] == [pa.string(), pa.int64(), pa.float64(), pa.string()]
    assert table.to_pylist() == [
        {"zip": "007", "count": 1, "share": 0.5, "image": "a.png",
         "text": 'two\nlines, "quoted"', "id": "a.csv#0"},
        {"zip": "12", "count": None, "share": 1000.0, "image": "b.png",
         "text": None, "id": "a.csv#1"},
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.tsv.gz", "a.tsv.bz2", "a.tsv.zst"])
def test_tabs_compression_and_a_mark_of_utf8(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbfid\timage\nx,y\ta.png\n"
    with pa.output_stream(tmp_path / name, compression="detect") as stream:
        stream.write(data)
    table = table_of(tmp_path / name)
    assert table.to_pylist() == [{"id": "x,y", "image": "a.png"}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl_keeps_types_and_text_that_looks_like_a_time(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": ["a.png", "b.png"], "n": 1, "when": "2024-01-01", "of": {"at": "2024-01-02"}},
        {"image": [], "n": None, "when": "2024-01-01 10:00:00", "of": None},
    ]
    assert of_text(tmp_path, lines(rows), "a.jsonl").drop(["id"]).to_pylist() == rows


def test_one_schema_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 300)
    rows: list[dict[str, Any]] = [{"id": n, "a": None} for n in range(40)]
    rows += [{"id": n, "a": n + 0.5, "late": ["x" * 400]} for n in range(40, 60)]
    table = of_text(tmp_path, "\n\n" + lines(rows).rstrip(), "a.ndjson")
    assert table.column("id").to_pylist() == list(range(60))
    assert table.column("a").to_pylist() == [None] * 40 + [n + 0.5 for n in range(40, 60)]
    assert table.column("late").to_pylist() == [None] * 40 + [["x" * 400]] * 20
    text = "id,a\n" + "".join(f"{n},{n if n < 50 else 'x'}\n" for n in range(60))
    assert of_text(tmp_path, text).column("a").to_pylist()[49:51] == ["49", "x"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "[1, 2]\n", "JSONL"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "JSONL"),
        ("a.jsonl", '{"a": 1}\n{"a": "x"}\n', "JSONL"),
        ("a.csv", "", "CSV"),
        ("a.csv", "a,a\n1,2\n", r"CSV \(two columns have one name: a, a"),
        ("a.csv", "a,b\n1,2\n1\n", "CSV"),
        ("a.csv", b"a\n\xff\n", "CSV"),
        ("a.csv.gz", "a\n1\n", "CSV"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=f"{name}: not readable as {says}"):
        of_text(tmp_path, text, name)
