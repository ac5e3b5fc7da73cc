"""Every kind of input through the job with the bundled model: the right rows, each once, also of a
run that is killed and goes on."""

import csv
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import caption
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow.fs import FileInfo

from tests.job.input.kinds.input_samples import (
    members_of,
    picture,
    rows_with_paths,
    width_of,
    write_images,
    write_img2dataset,
    write_jsonl,
    write_tar,
)
from tests.job.store import Store, bucket_of, serving
from trio.job.command import main
from trio.job.storage import exists, list_files, locate

ROOT = Path(__file__).resolve().parents[1]
PROMPT = ["--prompt", "Describe the image."]
ROWS = 16


@dataclass(frozen=True)
class Source:
    """An input, and what the job must make of it."""

    inputs: tuple[str, ...]
    widths: dict[str, int]
    """Of the images, by id."""
    errors: dict[str, str]
    """Kinds, by id, of rows that are errors."""


def tars(folder: Path) -> Source:
    write_img2dataset(folder, shards=2, rows=ROWS // 2)
    write_tar(folder / "x" / "odd.tar", [("a.txt", b"no picture"), ("b.png", picture(1))])
    widths = {f"{n // (ROWS // 2):05d}.tar/{n:09d}": width_of(n) for n in range(ROWS)}
    return Source(
        (str(folder),), widths | {"odd.tar/b": width_of(1)}, {"odd.tar/a": "image_missing"}
    )


def cut_tar(folder: Path) -> Source:
    path = write_tar(folder / "cut.tar", members_of(range(ROWS)))
    last = ROWS - 2
    with tarfile.open(path) as tar:
        cut = tar.getmember(f"{last:09d}.jpg").offset_data + 20
    path.write_bytes(path.read_bytes()[:cut])
    widths = {f"cut.tar/{n:09d}": width_of(n) for n in range(last)}
    return Source((str(path),), widths, {f"cut.tar/{last:09d}": "shard_cut"})


def images(folder: Path) -> Source:
    write_images(folder, ROWS)
    (folder / "broken.jpg").write_bytes(picture(0)[:50])
    widths = {f"trip {n % 2}/IMG.{n:03d}.png": width_of(n) for n in range(ROWS)}
    return Source((str(folder),), widths, {"broken.jpg": "image_"})


def jsonl(folder: Path) -> Source:
    rows = rows_with_paths(folder / "img", ROWS)
    rows += [{"id": "none", "image": "img/none.png"}, {"id": "out", "image": "../out.png"}]
    path = write_jsonl(folder / "rows.jsonl", rows)
    widths = {f"row-{n}": width_of(n) for n in range(ROWS)}
    return Source((str(path),), widths, {"none": "image_not_found", "out": "image_"})


def table(folder: Path) -> Source:
    """Without ids."""
    rows = rows_with_paths(folder / "img", ROWS)
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "stars"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    widths = {f"rows.csv#{n}": width_of(n) for n in range(ROWS)}
    return Source((str(folder / "rows.csv"),), widths, {})


def saved(folder: Path) -> Source:
    datasets.disable_progress_bars()
    cells = [{"bytes": picture(n), "path": None} for n in range(ROWS)]
    made = datasets.Dataset.from_dict({"image": cells})
    made.cast_column("image", datasets.Image()).save_to_disk(folder, num_shards=2)
    half = ROWS // 2
    name = "data-{:05d}-of-00002.arrow#{}"
    widths = {name.format(n // half, n % half): width_of(n) for n in range(ROWS)}
    return Source((str(folder),), widths, {})


KINDS: dict[str, Callable[[Path], Source]] = {
    "tars": tars, "cut tar": cut_tar, "images": images, "jsonl": jsonl, "csv": table,
    "saved": saved,
}  # fmt: skip


def check(output: str, *wanted: Source) -> None:
    """Each row once, with the image that is its own."""
    widths = {id: width for source in wanted for id, width in source.widths.items()}
    errors = {id: kind for source in wanted for id, kind in source.errors.items()}
    place = locate(output)
    assert exists(place.join("_SUCCESS"))
    rows = pq.read_table(place.join("rows").path, filesystem=place.filesystem).to_pylist()
    assert sorted(row["id"] for row in rows) == sorted([*widths, *errors])
    assert len({row["row"] for row in rows}) == len(rows)
    for row in rows:
        if row["id"] in errors:
            assert row["error"].startswith(errors[row["id"]]), row["error"]
        else:
            assert row["error"] is None and row["image_width"] == widths[row["id"]]
            assert row["response"] and row["prompt"] == PROMPT[1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_several_kinds_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [KINDS[kind](tmp_path / kind) for kind in ("cut tar", "images", "jsonl")]
    output = str(tmp_path / "out")
    inputs = [path for source in made for path in source.inputs]
    flags = ["--input", *inputs, "--output", output, *PROMPT, "--log-interval", "60"]
    assert main(caption.JOB, [*flags, "--dry-run"]) == 0
    assert not Path(output).exists()
    assert main(caption.JOB, flags) == 0
    check(output, *made)
    assert len(list((Path(output) / "index").iterdir())) == 3
    assert "index: 1 tar shard, 1 image shard, 1 JSONL or CSV shard" in capsys.readouterr().err


def killed_and_resumed(source: Source, output: str, log: Path) -> None:
    """A driver is killed once some files are there; the same command goes on."""
    command = [sys.executable, "jobs/caption.py", "--input", *source.inputs, "--output", output]
    command += [*PROMPT, "--rows-per-file", "2", "--max-running", "2", "--file-mb", "0"]
    command += ["--address", ray.get_runtime_context().gcs_address]
    with log.open("wb") as stream:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    while len(committed(output)) < 2:
        assert driver.poll() is None, log.read_text()
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before, indexes = committed(output), {info.path: info.mtime for info in index_of(output)}
    assert 2 <= len(before) < len(source.widths) // 2
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ("index:" in log.read_text()) == bool(indexes) and "index:" not in ended.stderr
    check(output, source)
    assert before.items() <= committed(output).items()
    assert {info.path: info.mtime for info in index_of(output)} == indexes


def committed(output: str) -> dict[str, object]:
    """Files of rows, and when they were written."""
    infos = list_files(locate(output).join("rows"))
    return {info.path: info.mtime for info in infos if info.path.endswith(".parquet")}


def index_of(output: str) -> list[FileInfo]:
    return list_files(locate(output).join("index"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on(kind: str, tmp_path: Path) -> None:
    killed_and_resumed(KINDS[kind](tmp_path / "in"), str(tmp_path / "out"), tmp_path / "log")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    with serving(tmp_path_factory.mktemp("s3")) as found:
        yield found


def uploaded(store: Store, folder: Path, source: Source) -> Source:
    """The same input in a bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"in/{path.relative_to(folder).as_posix()}", path.read_bytes())
    inputs = tuple(
        store.uri(f"in{path.removeprefix(str(folder))}".rstrip("/")) for path in source.inputs
    )
    return Source(inputs, source.widths, source.errors)


def hive(folder: Path) -> Source:
    """Parquet in partitions."""
    for day in range(ROWS // 8):
        cells = [picture(n) for n in range(day * 8, day * 8 + 8)]
        path = folder / f"year=2024/day={day}" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": cells}), path)
    name = "day={}/part-0.parquet#{}"
    widths = {name.format(n // 8, n % 8): width_of(n) for n in range(ROWS)}
    return Source((str(folder),), widths, {})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("kind", [*KINDS, "hive"])
def test_the_same_on_an_object_store(kind: str, tmp_path: Path, server: tuple[int, Path]) -> None:
    folder, store = tmp_path / "in", bucket_of(server)
    source = uploaded(store, folder, (KINDS | {"hive": hive})[kind](folder))
    killed_and_resumed(source, store.uri("out"), tmp_path / "log")
