"""JSONL and CSV as Parquet."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.errors import UserError
from trio.job.input.kinds import shard_index, text_tables
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.raw_rows import Notes
from trio.job.input.kinds.text_tables import is_csv, write_table
from trio.job.input.manifest import inspect
from trio.job.storage import locate


def table_of(path: Path, notes: Notes) -> pa.Table:
    out = path.parent / "out.parquet"
    write_table(Found(locate(str(path)), path.stat().st_size), path.name, out, notes)
    return pq.read_table(out)


def of_text(
    folder: Path, text: str | bytes, name: str = "a.csv", notes: Notes | None = None
) -> pa.Table:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return table_of(path, notes or Notes())


def test_types_of_csv_are_those_that_lose_nothing(tmp_path: Path) -> None:
    text = (
        'zip,count,share,image,text\n007,1,0.5,a.png,"two\nlines, ""quoted"""\n12,,1000.0,b.png,\n'
    )
    table = of_text(tmp_path, text)
    assert table.schema.types[:4] == [pa.string(), pa.int64(), pa.float64(), pa.string()]
    assert table.to_pylist() == [
        {"zip": "007", "count": 1, "share": 0.5, "image": "a.png",
         "text": 'two\nlines, "quoted"', "id": "a.csv#0"},
        {"zip": "12", "count": None, "share": 1000.0, "image": "b.png",
         "text": None, "id": "a.csv#1"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["1234567890123456789", "-12345678901234567"], [1234567890123456789, -12345678901234567]),
        (["9223372036854775807", "9223372036854775808"], None),
        (["1.10", "1.2"], None),
        (["1", "1.0"], None),
        (["1", "0.5", ""], [1.0, 0.5, None]),
        (["1.0", "0.5", "1e-05"], [1.0, 0.5, 1e-05]),
        (["1e999"], None),
        (["nan"], None),
        (["0x10"], None),
        (["-0"], [-0.0]),
        (["0.12345678901234567890"], None),
        (["", ""], [None, None]),
    ],
)  # fmt: skip
def test_no_digit_of_csv_is_lost(tmp_path: Path, written: list[str], read: list[Any]) -> None:
    text = "a,b\n" + "".join(f"{value},x\n" for value in written)
    assert of_text(tmp_path, text).column("a").to_pylist() == (read or written)


@pytest.mark.parametrize(
    "values",
    [[2**64 + 1], [0.5, 2**53 + 1], [{"b": [{"c": 10**400}]}], [[1, 2**63 + 1]]],
)
def test_no_digit_of_jsonl_is_lost(tmp_path: Path, values: list[Any]) -> None:
    with pytest.raises(UserError, match=r"JSONL \(a: .* digits are lost: \d{16}"):
        of_text(tmp_path, lines([{"a": value} for value in values]), "a.jsonl")


def test_long_numbers_of_jsonl_that_keep_their_digits(tmp_path: Path) -> None:
    rows = [{"a": 2**63 - 1, "b": f"[{2**64 + 1}]", "c": {"d": 2**53}, "e": 1 / 3},
            {"a": -(2**63), "b": "", "c": {"d": None}, "e": 1.0}]  # fmt: skip
    assert of_text(tmp_path, lines(rows), "a.jsonl").drop(["id"]).to_pylist() == rows


def test_empty_objects_are_left_out(tmp_path: Path) -> None:
    notes = Notes()
    row = {"image": "a.png", "meta": {}, "many": [[{}]], "of": {"none": {}, "n": 1}, "e": {"x": {}}}
    table = of_text(tmp_path, lines([row, {"image": "b.png"}]), "a.jsonl", notes)
    assert table.drop(["id"]).to_pylist() == [
        {"image": "a.png", "of": {"n": 1}},
        {"image": "b.png", "of": None},
    ]
    assert set(notes.counts.values()) == {5}


def test_an_empty_jsonl_beside_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"image": "a.png"}\n')
    manifest, schemas = inspect([str(tmp_path)], say=lambda _: None)
    assert [shard.rows for shard in manifest.shards] == [0, 1]
    assert [schema.names for schema in schemas] == [["image", "id"]] * 2


def test_a_csv_row_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(text_tables, "MOST_LINE", 1 << 20)
    text = f"n,image\n1,{'A' * 5000}\n2,{'B' * 50_000}\n"
    assert [len(cell) for cell in of_text(tmp_path, text).column("image").to_pylist()] == [
        5000,
        50_000,
    ]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no such device")
def test_no_room_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"n": n, "t": "x" * 100} for n in range(1000)]))
    full = tmp_path / "full"  # a link, as what fails is removed
    full.symlink_to("/dev/full")
    monkeypatch.setattr(shard_index, "name_of", lambda _: str(full))
    with pytest.raises(UserError, match=r"index .* cannot be written in /.*No space.* TMPDIR"):
        inspect([str(path)], say=lambda _: None)


def test_what_is_csv() -> None:
    names = ["a.csv", "a.TSV.gz", "a.csv.jsonl", "a.tsv.ndjson.gz", "csv"]
    assert [is_csv(name) for name in names] == [True, True, False, False, False]


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.tsv.gz", "a.tsv.bz2", "a.tsv.zst"])
def test_tabs_compression_and_a_mark_of_utf8(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbfid\timage\nx,y\ta.png\n"
    with pa.output_stream(tmp_path / name, compression="detect") as stream:
        stream.write(data)
    table = table_of(tmp_path / name, Notes())
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
