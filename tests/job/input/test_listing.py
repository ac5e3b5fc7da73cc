"""Which files of a folder are read, and what is said of the others."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.input.kinds.input_samples import write_images, write_img2dataset
from trio.errors import UserError
from trio.job.input.manifest import expand


def filled(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(*inputs: Path | str) -> tuple[list[str], list[str]]:
    """Names of the files that are read, and the lines that are said."""
    said: list[str] = []
    paths = [
        path for one in expand([str(i) for i in inputs], say=said.append) for path in one.paths
    ]
    return [Path(path).name for path in paths], said


def test_tars_of_img2dataset_without_what_lies_beside_them(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    filled(tmp_path, ["more.parquet", "x.csv", "odd.bin"])
    names, (line,) = found(tmp_path)
    assert names == ["00000.tar", "00001.tar"]
    assert (
        "tar files are read; left out: 1 Parquet file, 1 JSONL or CSV file, 4 files beside" in line
    )
    assert "(00000.parquet, 00000_stats.json, 00001.parquet and 1 more), 1 file of other" in line


def test_images_of_img2dataset_without_what_lies_beside_their_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "00000")
    filled(tmp_path, ["00000/trip 0_stats.json", "00000/trip 0.parquet"])
    names, (line,) = found(tmp_path)
    assert len(names) == 10 and "2 files beside shards of the same name" in line


@pytest.mark.parametrize(
    ("names", "read", "left"),
    [
        (["a.jpg", "b/c.PNG", "b/c.txt", "b/c.json", "d.webp"], ["a.jpg", "c.PNG", "d.webp"], []),
        (["a.jpg", "b.heic", "c.txt"], ["a.jpg"], ["2 files of other kinds (b.heic, c.txt)"]),
        (["a.jpg", "rows.jsonl"], ["rows.jsonl"], ["1 image file"]),
        (["a.jpg", "rows.parquet"], ["rows.parquet"], ["1 image file"]),
        (["a.jpg", "a.parquet", "a_stats.json"], ["a.parquet"], ["1 image file"]),
        (["img/a.jpg", "img.parquet"], ["img.parquet"], ["1 image file"]),
        (["a.csv.gz", "b.jsonl", "c.json"], ["a.csv.gz", "b.jsonl"], ["(c.json)"]),
        (["a.arrow", "b.csv"], ["a.arrow"], ["1 JSONL or CSV file"]),
        ([".a.jpg", "_b/c.jpg", "d.gif"], ["d.gif"], []),
        (["a.parquet", "b.tar.gz"], ["a.parquet"], ["(b.tar.gz)"]),
    ],
)
def test_one_kind_of_a_folder_is_read(
    names: list[str], read: list[str], left: list[str], tmp_path: Path
) -> None:
    filled(tmp_path, names)
    taken, said = found(tmp_path)
    assert taken == read and len(said) == len(left)
    assert all(part in line for part, line in zip(left, said, strict=True))


@pytest.mark.parametrize("names", [["a.tar.gz"], ["a.tgz", "b.tar"], ["a.TAR.zst"]])
def test_compressed_tars_are_refused(names: list[str], tmp_path: Path) -> None:
    filled(tmp_path, names)
    for given in (tmp_path, tmp_path / names[0]):
        with pytest.raises(UserError, match=r"a compressed tar, .* unpack it to a \.tar"):
            found(given)


def test_images_by_pattern_and_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 4)
    names, said = found(
        tmp_path / "photos" / "**" / "*2.png", tmp_path / "photos/trip 0/IMG.000.png"
    )
    assert names == ["IMG.002.png", "IMG.000.png"] and said == []
    with pytest.raises(UserError, match=r"IMG\.000\.png twice"):
        found(tmp_path / "photos", tmp_path / "photos/trip 0/IMG.000.png")


def test_an_export_whose_name_says_nothing_is_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "part-0")
    filled(tmp_path, ["a.png", "b"])
    names, (line,) = found(tmp_path)
    assert names == ["part-0"] and "1 image file, 1 file of other kinds (b)" in line
