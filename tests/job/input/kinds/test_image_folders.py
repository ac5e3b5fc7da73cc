"""Folders of images as shards."""

from pathlib import Path
from typing import Any

import pytest

from tests.job.input.kinds.input_samples import picture, write_images
from trio.job.input.kinds import image_folders
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.image_folders import bytes_beside, image_rows
from trio.job.input.kinds.raw_rows import Notes
from trio.job.input.manifest import expand


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
