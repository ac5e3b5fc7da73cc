"""Folders of images as shards."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.input.kinds.input_samples import picture, write_images
from trio.job.images.fetch import fetch
from trio.job.images.policy import ImagePolicy
from trio.job.input.kinds import image_folders
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.image_folders import bytes_beside, image_rows
from trio.job.input.kinds.raw_rows import Notes
from trio.job.input.manifest import expand, inspect
from trio.job.input.own_columns import partitions, with_fields
from trio.job.storage import parent


def found(folder: Path) -> list[Found]:
    return expand([str(folder)], say=lambda _: None)


def rows(shards: list[Found], notes: Notes | None = None) -> list[dict[str, Any]]:
    return [row for shard in shards for row in image_rows(shard, notes or Notes())]


def test_rows_are_named_by_their_paths(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    (shard,) = found(tmp_path)
    assert shard.size == sum(len(picture(n)) for n in range(4)) and shard.kind == "image"
    made = rows([shard])
    names = ["trip 0/IMG.000.png", "trip 0/IMG.002.png", "trip 1/IMG.001.png", "trip 1/IMG.003.png"]
    assert [(row["id"], row["image"]) for row in made] == [(name, name) for name in names]
    assert [row["txt"] for row in made] == [f"old text {n}" for n in (0, 2, 1, 3)]
    assert '"width": 12' in made[1]["json"] and bytes_beside(shard) > 4 * 200


def test_a_listing_tells_whether_the_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folders, "CHUNK", 3)
    write_images(tmp_path, 8)
    before = found(tmp_path)
    assert [len(shard.files) for shard in before] == [3, 3, 2] and before == found(tmp_path)
    assert len(rows(before)) == 8
    (tmp_path / "trip 1/IMG.007.png").rename(tmp_path / "trip 1/IMG.008.png")
    after = found(tmp_path)
    assert after[:2] == before[:2] or after[0].location == before[0].location
    assert after[2].location != before[2].location and after[2].size == before[2].size


def test_what_lies_beside_and_cannot_be_read(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    shards = found(tmp_path)
    (tmp_path / "trip 0/IMG.000.txt").unlink()
    (tmp_path / "trip 1/IMG.001.txt").write_bytes(b"\xff")
    notes = Notes()
    assert [row["txt"] for row in rows(shards, notes)] == [None, None]
    assert sorted(line.partition(":")[0] for line in notes.lines()) == [
        "files beside images that cannot be read, whose columns are null",
        "texts that are not UTF-8, which are null",
    ]


def test_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    (tmp_path / "secret").write_text("secret")
    for name, target in (("trip 0/IMG.000.txt", "secret"), ("trip 1/IMG.001.txt", "photos/note")):
        (tmp_path / "photos" / name).unlink()
        (tmp_path / "photos" / name).symlink_to(tmp_path / target)
    (tmp_path / "photos/note").write_text("mine")
    notes = Notes()
    assert [row["txt"] for row in rows(found(tmp_path / "photos"), notes)] == [None, "mine"]
    (line,) = notes.lines()
    assert line.startswith(
        "files beside images that are links out of their folder, read as null: 1"
    )


def test_partitions_are_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("a.png", "day=1/b.png", "day=1/c/d.png", "day=2/x=y/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "day=1/c/d.txt").write_text("beside")
    manifest, schemas = inspect([str(tmp_path)], say=lambda _: None)
    paths = [shard.path for shard in manifest.shards]
    columns = partitions(paths)
    assert columns == pa.schema({"day": pa.int64(), "x": pa.string()})
    names = [schema.names[3:] for schema in with_fields(schemas, paths, columns)]
    assert names == [[], ["day"], ["day", "x"]]
    assert manifest.difference(found(tmp_path)) is None
    tables = [pq.read_table(shard.parquet) for shard in manifest.shards]
    assert [row["id"] for table in tables for row in table.to_pylist()] == [
        "a.png", "day=1/b.png", "day=1/c/d.png", "day=2/x=y/b.png"
    ]  # fmt: skip
    assert tables[1].column("txt").to_pylist() == [None, "beside"]
    for shard, table in zip(manifest.shards, tables, strict=True):
        for name in table.column("image").to_pylist():
            assert fetch(name, parent(shard.path), ImagePolicy()) == picture(1)
