"""Pictures of other files, found by their names."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import write_shard
from trio.errors import UserError
from trio.job.input.joined_pictures import GROUPS, JoinedPictures, PictureFiles

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def files(*paths: Path, **changes: Any) -> PictureFiles:
    given = {"key": "id", "image": "image", "by": ".name"} | changes
    sizes = tuple(path.stat().st_size for path in paths if path.exists())
    return PictureFiles(paths=tuple(map(str, paths)), sizes=sizes, **given)


def pictures(path: Path, names: list[Any], kind: pa.DataType | None = None) -> Path:
    schema = pa.schema([("id", kind or pa.string()), ("image", CELL), ("other", pa.string())])
    cells = [{"id": n, "image": {"bytes": f"of {n}".encode(), "path": f"{n}.jpg"}} for n in names]
    return write_shard(path, cells, schema, row_group=2)


def beside(found: PictureFiles, names: list[Any]) -> list[bytes | None]:
    table = pa.table({".name": names, "id": list(range(len(names)))})
    joined = JoinedPictures(found).beside(table)
    assert joined.column_names == [".name", "id", "image"]
    assert joined.num_rows == len(names)
    return [cell and cell["bytes"] for cell in joined.column("image").to_pylist()]


def test_rows_get_their_pictures_in_their_own_order(tmp_path: Path) -> None:
    one = pictures(tmp_path / "0.parquet", ["a", "b", "c", "d", "e"])
    two = pictures(tmp_path / "1.parquet", ["f", "g"])
    wanted = ["g", "a", "e", "a", "f", "c", "a"]
    assert beside(files(one, two), wanted) == [f"of {name}".encode() for name in wanted]


def test_a_picture_that_is_not_there_is_null(tmp_path: Path) -> None:
    found = files(pictures(tmp_path / "0.parquet", ["a", "b", "c"]))
    assert beside(found, ["x", "c", None, "a", ""]) == [None, b"of c", None, b"of a", None]
    assert beside(found, ["x", "y"]) == [None, None]
    assert beside(found, []) == []


def test_what_has_no_name_is_not_called_none(tmp_path: Path) -> None:
    found = files(pictures(tmp_path / "0.parquet", [None, "None", "a", None]))
    assert beside(found, [None, "None"]) == [None, b"of None"]


def test_numbers_and_texts_name_the_same_picture(tmp_path: Path) -> None:
    found = files(pictures(tmp_path / "0.parquet", [7, 8], pa.int64()))
    assert beside(found, ["8", "7"]) == beside(found, [8, 7]) == [b"of 8", b"of 7"]


def test_pictures_of_more_groups_than_are_held(tmp_path: Path) -> None:
    names = [f"p{n}" for n in range(2 * GROUPS + 7)]
    found = files(pictures(tmp_path / "0.parquet", names))
    assert pq.ParquetFile(tmp_path / "0.parquet").num_row_groups > GROUPS
    joined = JoinedPictures(found)
    for wanted in (names, names[::-1], names[:3], names[::5]):
        image = joined.beside(pa.table({".name": wanted})).column("image")
        assert [cell["path"] for cell in image.to_pylist()] == [f"{name}.jpg" for name in wanted]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"file": ["a"], "jpg": [b"of a"]}), path)
    found = files(path, key="file", image="jpg", by=".photo")
    joined = JoinedPictures(found).beside(pa.table({".photo": ["a"]}))
    assert joined.column("image").to_pylist() == [b"of a"]


@pytest.mark.parametrize("across", [True, False])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, across: bool) -> None:
    groups = [["a", "b"], ["c", "a"]] if across else [["b"], ["c", "d", "a", "a"]]
    paths = [pictures(tmp_path / f"{n}.parquet", names) for n, names in enumerate(groups)]
    with pytest.raises(UserError, match=r"1\.parquet: id 'a' names two pictures"):
        files(*paths).check()


@pytest.mark.parametrize(
    ("changes", "lacks"), [({"key": "name"}, "name"), ({"image": "photo"}, "photo")]
)
def test_a_column_that_is_missing_is_named(
    tmp_path: Path, changes: dict[str, str], lacks: str
) -> None:
    path = pictures(tmp_path / "0.parquet", ["a"])
    with pytest.raises(UserError, match=f"no column '{lacks}' of pictures; it has id, image, oth"):
        files(path, **changes).check()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    gone, broken = tmp_path / "gone.parquet", tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no more PAR1")
    for path in (gone, broken):
        with pytest.raises(UserError, match=f"{path.name}: pictures cannot be read") as raised:
            files(path).check()
        assert "\n" not in str(raised.value)


def test_another_size_is_another_index(tmp_path: Path) -> None:
    path = pictures(tmp_path / "0.parquet", ["a"])
    assert beside(files(path), ["b"]) == [None]
    pictures(path, ["a", "b", "c", "d"])
    assert beside(files(path), ["b"]) == [b"of b"]
