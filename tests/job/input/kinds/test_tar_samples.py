"""Rows of WebDataset tars: keys, pictures, texts, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.job.input.kinds.input_samples import members_of, picture, write_tar
from trio.job.input.kinds.raw_rows import Notes
from trio.job.input.kinds.read_ahead import ReadAhead
from trio.job.input.kinds.tar_samples import samples

Rows = list[dict[str, Any]]


def rows_of(data: bytes) -> tuple[Rows, list[str]]:
    notes = Notes()
    file = ReadAhead(pa.BufferReader(data), len(data), far=False)
    return list(samples(file, "a.tar", notes)), list(notes.lines())


def rows_in(folder: Path, *members: tuple[str, bytes]) -> tuple[Rows, list[str]]:
    return rows_of(write_tar(folder / "a.tar", members).read_bytes())


def shown(row: dict[str, Any]) -> list[str]:
    return [place["path"] for place in row["image"] or ()]


def test_members_of_a_key_are_a_row(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", members_of(range(3))).read_bytes()
    rows, said = rows_of(data)
    assert [row["id"] for row in rows] == [f"a.tar/{n:09d}" for n in range(3)] and not said
    assert [row["txt"] for row in rows] == [f"old text {n}" for n in range(3)]
    assert '"width": 11' in rows[1]["json"]
    (place,) = rows[2]["image"]
    assert data[place["offset"] : place["offset"] + place["size"]] == picture(2)


def test_keys_end_at_the_first_dot_of_a_name(tmp_path: Path) -> None:
    jpg, x = picture(0), b"x"
    rows, said = rows_in(
        tmp_path,
        ("x.y/one.jpg", jpg), ("x.y/one.txt", x), ("x.y/.hidden.jpg", jpg), ("x.y/none", x),
        ("two.seg.png", jpg), ("two.PNG", jpg), ("two.cls", x), ("./IMG.2020.v1.jpg", jpg),
        ("pair.0.jpg", jpg), ("pair.1.jpg", jpg), ("both.jpg", jpg), ("both.png", jpg),
    )  # fmt: skip
    assert {row["id"]: shown(row) for row in rows} == {
        "a.tar/x.y/one": ["x.y/one.jpg"],
        "a.tar/two": ["two.PNG"],
        "a.tar/IMG": ["./IMG.2020.v1.jpg"],
        "a.tar/pair": ["pair.0.jpg", "pair.1.jpg"],
        "a.tar/both": ["both.jpg"],
    }
    assert said == [
        "members that are no image, txt or json, left out: 1, first two.cls",
        "keys of several pictures, of which the first is taken: 1, first both.jpg",
    ]


def test_a_key_that_comes_again_is_another_row(tmp_path: Path) -> None:
    jpg = picture(0)
    rows, _ = rows_in(tmp_path, ("a.jpg", jpg), ("b.jpg", jpg), ("a.jpg", jpg))
    assert [row["id"] for row in rows] == ["a.tar/a", "a.tar/b", "a.tar/a"]


def test_without_picture_and_with_texts_that_are_none(tmp_path: Path) -> None:
    rows, said = rows_in(
        tmp_path, ("a.txt", b"\xff\xfe"), ("b.jpg", picture(0)), ("b.txt", b"\xef\xbb\xbfhi")
    )
    assert [(shown(row), row["txt"]) for row in rows] == [([], None), (["b.jpg"], "hi")]
    assert said == ["texts that are not UTF-8, which are null: 1, first a.txt"]


def test_a_cut_tar_gives_its_rows_and_one_error(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", members_of(range(4))).read_bytes()
    place = rows_of(data)[0][2]["image"][0]
    rows, _ = rows_of(data[: place["offset"] + 20])
    assert [row["id"] for row in rows] == [f"a.tar/{n:09d}" for n in range(3)]
    assert [row.get("error") for row in rows[:2]] == [None, None]
    assert rows[2]["image"] is None
    assert rows[2]["error"] == {
        "kind": "shard_cut",
        "message": "the tar ends within 000000002.jpg",
    }
    rows, said = rows_of(data[: place["offset"] - 512])
    assert len(rows) == 2 and said == ["tars without an end mark, which may be cut: 1, first a.tar"]


def test_damage_is_an_error_row(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", members_of(range(2))).read_bytes())
    offset = rows_of(bytes(data))[0][1]["image"][0]["offset"] - 512
    data[offset : offset + 300] = b"\x01" * 300
    rows, _ = rows_of(bytes(data))
    assert [row["id"] for row in rows] == ["a.tar/000000000", f"a.tar@{offset}"]
    assert rows[1]["error"]["kind"] == "shard_cut"


def test_a_picture_too_large_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio.job.input.kinds.tar_samples.MAX_BYTES", 50)
    rows, _ = rows_in(tmp_path, ("a.jpg", b"x" * 51), ("b.jpg", b"x" * 50))
    assert rows[0]["image"] is None and rows[0]["error"]["kind"] == "image_oversized"
    assert shown(rows[1]) == ["b.jpg"]


@pytest.mark.parametrize("far", [False, True])
def test_a_tar_is_read_once_at_the_most(tmp_path: Path, far: bool) -> None:
    """Though the texts of a key lie before the header that ends it."""
    data = write_tar(tmp_path / "a.tar", members_of(range(300))).read_bytes()
    file = ReadAhead(pa.BufferReader(data), len(data), far=far)
    assert len(list(samples(file, "a.tar", Notes()))) == 300
    assert file.bytes_read <= 1.1 * len(data)
