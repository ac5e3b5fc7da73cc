"""Inputs in their real layouts: what img2dataset, `datasets` and others write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.job.fakes import png


def picture(number: int) -> bytes:
    """That tells its number by its colour, and by its width up to 60 of them."""
    return png((number % 256, number // 256 % 256, 7), (width_of(number), 9))


def width_of(number: int) -> int:
    return 10 + number % 60


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def facts_of(number: int) -> dict[str, Any]:
    """The JSON of a row, as img2dataset writes it."""
    return {
        "caption": f"old text {number}",
        "url": f"https://images.example.org/{number}.jpg",
        "key": f"{number:09d}",
        "status": "success",
        "error_message": None,
        "width": width_of(number),
        "height": 9,
        "exif": json.dumps({"Image Orientation": "1"}),
        "sha256": f"{number:064x}",
    }


def members_of(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    out = []
    for number in numbers:
        key = f"{number:09d}"
        out += [(f"{key}.jpg", picture(number))]
        out += [(f"{key}.json", json.dumps(facts_of(number), indent=4).encode())]
        out += [(f"{key}.txt", f"old text {number}".encode())]
    return out


def write_img2dataset(folder: Path, shards: int = 2, rows: int = 10) -> Path:
    """Tars with the Parquet and the statistics beside each."""
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        write_tar(folder / f"{shard:05d}.tar", members_of(numbers))
        table = pa.Table.from_pylist([facts_of(number) for number in numbers])
        pq.write_table(table, folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": rows, "successes": rows})
        )
    return folder


def write_images(folder: Path, rows: int = 10, sidecars: bool = True) -> Path:
    """Images in two folders, each with its text and JSON beside it."""
    for number in range(rows):
        stem = folder / f"trip {number % 2}" / f"IMG.{number:03d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(f"{stem.name}.png").write_bytes(picture(number))
        if sidecars:
            stem.with_name(f"{stem.name}.txt").write_text(f"old text {number}")
            stem.with_name(f"{stem.name}.json").write_text(json.dumps(facts_of(number)))
    return folder


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_with_paths(folder: Path, rows: int = 10) -> list[dict[str, Any]]:
    """Rows that name images of a folder, which are written there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(picture(number))
    return [
        {"id": f"row-{number}", "image": f"{folder.name}/{number}.png", "stars": number / 2}
        for number in range(rows)
    ]
