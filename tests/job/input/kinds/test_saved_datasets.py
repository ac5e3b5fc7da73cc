"""Data sets of the library `datasets`: what it saved, and repositories laid out for the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import reader_of
from tests.job.input.kinds.input_samples import (
    members_of,
    picture,
    width_of,
    write_images,
    write_tar,
)
from trio.errors import UserError
from trio.job.input.columns import resolve
from trio.job.input.kinds import saved_datasets
from trio.job.input.kinds.saved_datasets import Part, files_of
from trio.job.input.manifest import expand, inspect
from trio.job.input.units import units

ROOT = Path(__file__).resolve().parents[4]
SERVER = ROOT / "tests" / "job" / "hub_files_server.py"


def saved(rows: int = 150) -> datasets.Dataset:
    cells = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(rows)]
    made = datasets.Dataset.from_dict({"id": [f"s{n}" for n in range(rows)], "image": cells})
    return made.cast_column("image", datasets.Image())


def write(made: datasets.Dataset | datasets.DatasetDict, path: Path) -> str:
    datasets.disable_progress_bars()
    made.save_to_disk(str(path))
    return str(path)


def test_a_saved_data_set_is_read_batch_by_batch(tmp_path: Path) -> None:
    place = write(saved(), tmp_path / "d")
    (tmp_path / "d" / "cache-0123.arrow").write_bytes(b"of map")
    said: list[str] = []
    manifest, schemas = inspect([place], say=said.append)
    (shard,) = manifest.shards
    assert shard.row_groups == (100, 50) and len(said) == 1
    assert "index: 1 Arrow shard" in said[0]
    columns = resolve(schemas, [shard.path], {}, prompt_given=True)
    reader = reader_of(manifest, columns)
    for unit in [*units(manifest, 40), *units(manifest, 149)]:
        table = reader.read(unit)
        assert isinstance(table, pa.Table)
        numbers = range(unit.start, unit.stop)
        assert table.column("id").to_pylist() == [f"s{n}" for n in numbers]
        cells = table.column("image").to_pylist()
        assert [cell["bytes"] for cell in cells] == [picture(n) for n in numbers]


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=saved(3), test=saved(5))
    place = write(splits, tmp_path / "d")
    assert inspect([place], part=Part(split="test"), say=lambda _: None)[0].rows == 5
    for part, says in (
        (Part(), "several are there; give as --split one of train, test"),
        (Part(split="val"), "val is not there; give as --split one of train, test"),
        (Part("en", "test"), "has no configurations"),
    ):
        with pytest.raises(UserError, match=says):
            expand([place], part=part)
    only = write(datasets.DatasetDict(train=saved(2)), tmp_path / "one")
    assert inspect([only], say=lambda _: None)[0].rows == 2
    with pytest.raises(UserError, match="test is not there; give as --split one of none"):
        expand([f"{place}/test"], part=Part(split="test"))


def test_a_part_of_what_has_none(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    with pytest.raises(UserError, match="--subset en --split val: no input here has such parts"):
        expand([str(tmp_path)], part=Part("en", "val"))


def test_a_saved_data_set_that_is_not_whole(tmp_path: Path) -> None:
    place = write(saved(3), tmp_path / "d")
    (tmp_path / "d" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow is not there"):
        expand([place])
    (tmp_path / "d" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        expand([place])


@pytest.mark.parametrize("text", ['{"step": 3}', "[1]", '{"_data_files": 1, "splits": 2}'])
def test_other_files_of_these_names(tmp_path: Path, text: str) -> None:
    shard(tmp_path / "a.parquet")
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).write_text(text)
        assert [one.location.path for one in expand([str(tmp_path)])] == [
            str(tmp_path / "a.parquet")
        ]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["."]}')
    with pytest.raises(UserError, match=r"state\.json names no data files"):
        expand([str(tmp_path)])


def shard(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": ["a.png"]}), path)


CONFIGS = """---
configs:
- config_name: en
  data_files: en/*.parquet
- config_name: de
  data_files: [{split: test, path: de/*.parquet}, {split: dev, path: dev/*.parquet}]
---
"""


def test_files_of_a_repository_by_configuration_and_split(tmp_path: Path) -> None:
    for name in ("en/test-0", "de/a", "de/b", "dev/c"):
        shard(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(CONFIGS)

    def files(*part: str) -> list[str]:
        found = files_of(str(tmp_path), "uri", Part(*part))
        return [str(Path(name).relative_to(tmp_path)) for name in found]

    assert files("en") == ["en/test-0.parquet"]
    assert files("de", "test") == ["de/a.parquet", "de/b.parquet"]
    for part, says in (
        ((), "--input uri: several are there; give as --subset one of en, de"),
        (("de",), "several are there; give as --split one of test, dev"),
        (("fr",), "fr is not there; give as --subset one of en, de"),
    ):
        with pytest.raises(UserError, match=says):
            files(*part)
    with pytest.raises(UserError, match="--input uri: no data set to be read"):
        files_of(str(tmp_path / "nowhere"), "uri", Part())


PARTS = """---
configs:
- config_name: tars
  data_files: wds/*.tar
- config_name: photos
  data_files: [{split: test, path: "photos/**/*.png"}]
---
"""
ON_THE_HUB = """
from trio.errors import UserError
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy
from trio.job.input.kinds.saved_datasets import Part
from trio.job.input.manifest import expand, inspect
from trio.job.input.reader import RunReader
from trio.job.input.units import units
from trio.job.storage import parent

uri = "hf://datasets/org/name"
for part in (Part("tars"), Part("photos", "test")):
    manifest, _ = inspect([uri], part=part)
    assert manifest.difference(expand([uri], part=part)) is None
    (shard,) = manifest.shards
    reader = RunReader({0: shard}, {"image": "image", "id": "id"}, lambda *_: None)
    for unit in units(manifest, 3):
        table, base = reader.read(unit), parent(shard.path)
        for row in table.to_pylist():
            (image,) = load_images(row["image"], base, ImagePolicy())
            print(row["id"], image.width)
try:
    expand([uri])
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_repositories_are_read_from_a_hub(tmp_path: Path) -> None:
    """In processes of their own, as the library looks for its Hub when it is imported."""
    write_tar(tmp_path / "wds" / "0.tar", members_of(range(4)))
    write_images(tmp_path / "photos", 2)
    (tmp_path / "README.md").write_text(PARTS)
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
    here |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB],
            env=os.environ | here, cwd=ROOT, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        *(f"0.tar/{n:09d} {width_of(n)}" for n in range(4)),
        *(f"photos/trip {n}/IMG.00{n}.png {width_of(n)}" for n in range(2)),
        "--input hf://datasets/org/name: several are there; give as --subset one of tars, photos",
    ]


def test_files_on_the_hub_are_those_of_the_listing() -> None:
    path = saved_datasets._path
    name = "hf://datasets/org/name@0123abc/data/a@b.parquet"
    assert path(name, None) == "datasets/org/name/data/a@b.parquet"
    assert path(name, "@v1") == "datasets/org/name@v1/data/a@b.parquet"
    match = saved_datasets._REPOSITORY.fullmatch
    assert match("hf://datasets/org/name") and match("hf://datasets/org/name@v1/")
    assert not match("hf://datasets/org/name/data") and not match("hf://datasets/org/n*")
