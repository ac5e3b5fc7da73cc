"""What runs keep for a page: of which rows, exactly once, the same after they were stopped."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caption
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import vqa
from PIL import Image

from tests.job.fakes import png, write_shard
from tests.job.faults import faulty
from tests.job.runs import execute, rows
from tests.job.store import bucket_of
from tests.job.store import serving as serving_s3
from trio.job import runner
from trio.job.command import Job, main
from trio.job.input.manifest import inspect
from trio.job.output.gallery import Sample, sample_of
from trio.job.output.schema import key_of, row_key
from trio.job.resume import committed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])
FEW_TOKENS = "3/100"
"""A retention at which the bundled model changes some of its answers."""
SIZES = (30, 0, 25)
LIMIT, COUNT = 50, 2


def write_input(folder: Path, broken: Sequence[int] = ()) -> Path:
    """Images of a colour each; in the first shard those of some rows are none."""
    for number, size in enumerate(SIZES):
        rows = [
            {"id": n, "image": png((n, number, 0), (400, 200)), "prompt": f"p{number}-{n}"}
            | ({"image": b"junk"} if number == 0 and n in broken else {})
            for n in range(size)
        ]
        write_shard(folder / f"{number}.parquet", rows, SCHEMA, row_group=10)
    return folder


def gallery(output: Path) -> list[dict[str, Any]]:
    """Rows of all its files, in order, each once."""
    found = pq.read_table(output / "gallery").to_pylist() if (output / "gallery").exists() else []
    keys = [key_of(one) for one in found]
    assert len(set(keys)) == len(keys)
    return sorted(found, key=key_of)


def sample(folder: Path, limit: int | None, count: int, seed: int = 0) -> Sample:
    found = sample_of(inspect([str(folder)])[0], limit, count, seed)
    assert found is not None
    return found


def test_the_sample_errors_of_a_wider_one_and_the_same_when_the_run_goes_on(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", broken=range(0, 30, 3))
    out = tmp_path / "out"
    asked: dict[str, Any] = {"limit": LIMIT, "gallery": COUNT, "seed": 5}
    execute(shards, out, **asked)
    found, chosen = gallery(out), sample(shards, LIMIT, COUNT, seed=5)
    assert {one["row"] for one in found if one["why"] == "sample"} == chosen.kept
    failed = {one["row"] for one in rows(out) if one["error"]}
    assert len(failed) == 10 and len(chosen.wider) == 10 * COUNT
    errors = failed & chosen.wider - chosen.kept
    assert {one["row"] for one in found if one["why"] == "error"} == errors != set()
    assert len(found) == COUNT + len(errors)
    written = {one["row"]: one for one in rows(out)}
    for one in found:
        own = written[one["row"]]
        assert one["id"] == str(own["id"]) and one["response"] == own["response"]
        assert one["error"] == own["error"] and one["prompt"] == own["prompt"]
        if own["error"]:
            assert one["thumbnails"] == one["image_sizes"] == [] and one["boxes"] is None
            continue
        (thumbnail,) = one["thumbnails"]
        assert Image.open(io.BytesIO(thumbnail)).size == (320, 160)
        assert one["image_sizes"] == [{"width": 400, "height": 200}]
        assert one["kept_tokens"] == [list(range(8)), list(range(4))]
        assert len(one["boxes"]) == 4 * one["image_tokens"][0] == 4 * one["visual_tokens"]
    # Two units lose their rows, as if their process had died before it wrote them; one of them has
    # nothing to keep, and a file that says otherwise.
    names = os.listdir(out / "gallery")
    bare = next(name for name in sorted(os.listdir(out / "rows")) if name not in names)
    shutil.copy(out / "gallery" / names[0], out / "gallery" / bare)
    for name in (names[0], bare):
        (out / "rows" / name).unlink()
    (out / "_SUCCESS").unlink()
    execute(shards, out, **asked)
    assert gallery(out) == found and sorted(os.listdir(out / "gallery")) == sorted(names)


@pytest.mark.slow
def test_none_where_none_is_asked_for_also_when_a_run_goes_on_without(tmp_path: Path) -> None:
    shards, out = write_input(tmp_path / "in"), tmp_path / "out"
    execute(shards, out, limit=16, gallery=1)
    (kept,) = os.listdir(out / "gallery")
    (out / "_SUCCESS").unlink()
    (out / "rows" / kept).unlink()
    summary = execute(shards, out, limit=16, gallery=0)
    assert summary["rows"] == 16 and os.listdir(out / "gallery") == []


def run(job: Job, *flags: str) -> int:
    return main(job, [*flags, "--log-interval", "60"])


def of_demo(limit: int, count: int) -> Sample:
    from trio.bundled import SHARD

    return sample(SHARD, limit, count)


def check_shown(found: Sequence[dict[str, Any]], written: Sequence[dict[str, Any]]) -> None:
    """Rows of the bundled shard against those of `rows/`, which have kept tokens, too."""
    by_key = {key_of(one): one for one in written}
    same = ("prompt", "response", "error", "finish_reason", "visual_tokens", "retention")
    for one in found:
        own = by_key[key_of(one)]
        assert [one[name] for name in same] == [own[name] for name in same]
        assert one["kept_tokens"] == own["kept_tokens"]
        assert len(one["boxes"]) == 4 * sum(one["image_tokens"]) == 4 * one["visual_tokens"]
        (thumbnail,), (size,) = one["thumbnails"], one["image_sizes"]
        assert Image.open(io.BytesIO(thumbnail)).size == (size["width"], size["height"])
        assert (size["width"], size["height"]) == (own["image_width"], own["image_height"])


@pytest.mark.slow
def test_settings_that_disagree_stand_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--limit", "30", "--compare", f"1,{FEW_TOKENS}", "--gallery", "2", "--save-kept"]
    assert run(caption.JOB, *flags, "--output", str(out)) == 0
    chosen, found, written = of_demo(30, 2), gallery(out), rows(out)
    said: dict[int, set[str]] = {}
    for one in written:
        said.setdefault(one["row"], set()).add(one["response"])
    differ = {row for row in chosen.wider - chosen.kept if len(said[row]) > 1}
    assert differ and {one["row"] for one in found} == chosen.kept | differ
    assert {one["row"] for one in found if one["why"] == "disagreement"} == differ
    assert all(
        {one["setting"] for one in found if one["row"] == row} == {0, 1}
        for row in chosen.kept | differ
    )
    check_shown(found, written)


@pytest.mark.slow
def test_audited_answers_that_differ_in_a_run_of_questions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--limit", "40", "--retention", FEW_TOKENS, "--audit", "0.7", "--save-kept"]
    assert run(vqa.JOB, *flags, "--gallery", "3", "--output", str(out)) == 0
    chosen, found, written = of_demo(40, 3), gallery(out), rows(out)
    differ = {one["row"] for one in written if one["audit_match"] is False}
    more = differ & chosen.wider - chosen.kept
    assert more and {one["row"] for one in found if one["why"] == "disagreement"} == more
    assert {one["row"] for one in found if one["why"] == "sample"} == chosen.kept
    for one in found:
        assert one["answers"] and one["score"] is not None
        assert (one["audit_match"] is False) == (one["row"] in differ)
        assert (one["audit_response"] is None) == (one["audit_match"] is None)
    check_shown(found, written)


@pytest.mark.slow
@pytest.mark.parametrize("job", [caption.JOB, vqa.JOB], ids=lambda job: job.name)
def test_killed_runs_keep_the_same_rows_as_one_that_was_not(tmp_path: Path, job: Job) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = ["--limit", "60", "--retention", FEW_TOKENS, "--gallery", "3", "--audit", "0.5"]
    # More units than are under way at once, whose files stay.
    flags += ["--rows-per-file", "1", "--file-mb", "0"]
    flags += ["--dtype", "float32"]  # in bfloat16 what is kept follows from the batch, too
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(ROOT / "jobs" / job.prog), *flags, "--output", str(killed)]
    for units in (2, 18):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--address", address], stdout=log, stderr=log)
        while process.poll() is None and len(list((killed / "rows").glob("*.parquet"))) < units:
            time.sleep(0.01)
        assert process.poll() is None, (tmp_path / "log").read_text()
        process.kill()
        process.wait()
    for output in (killed, whole):
        assert run(job, *flags, "--output", str(output)) == 0
    one, other = (
        [{**line, "saliency": None} for line in gallery(output)] for output in (killed, whole)
    )
    assert one == other, "but for scores, whose last digits follow from the batch"
    kept = {line["row"] for line in gallery(whole) if line["why"] == "sample"}
    assert kept == of_demo(60, 3).kept


@pytest.mark.slow
def test_rows_that_kill_their_engine_are_kept_as_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though processes die again and again, each row is kept once."""
    monkeypatch.setattr(runner, "PAUSES_S", (0.1,) * 4)
    prompts = [f"p{n}" if n not in (7, 19) else "crash" for n in range(40)]
    lines = [
        {"id": n, "image": png((n, 0, 0)), "prompt": prompt} for n, prompt in enumerate(prompts)
    ]
    write_shard(tmp_path / "in" / "0.parquet", lines, SCHEMA, row_group=10)
    execute(tmp_path / "in", tmp_path / "out", faulty(), gallery=4)
    chosen, found = sample(tmp_path / "in", None, 4), gallery(tmp_path / "out")
    assert chosen.wider == {row_key(0, n) for n in range(40)}
    assert {one["row"] for one in found} == chosen.kept | {7, 19}
    for one in found:
        bad = one["row"] in (7, 19)
        assert (one["error"] or "").startswith("quarantined") == bad
        assert len(one["thumbnails"]) == (0 if bad else 1)


@pytest.mark.slow
def test_on_an_object_store_and_after_an_engine_was_killed(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", broken=[4])
    starts, here = tmp_path / "starts", tmp_path / "here"
    with serving_s3(tmp_path) as server:
        store = bucket_of(server)
        output = store.at("out")

        factory = faulty(delay_s=0.02, starts=starts)
        killer = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(starts), str(signal.SIGKILL.value)]
        )
        summary = execute(shards, output.uri, factory, limit=LIMIT, gallery=COUNT, file_mb=1)
        killer.wait()
        assert summary["rows"] == LIMIT and len(starts.read_text().split()) > 1
        store.put("out/gallery/000009-0000000000-0000000008.parquet", b"of a killed process")
        committed.sweep_gallery(output, committed.listed(output))
        folder = output.join("gallery")
        found = pq.read_table(folder.path, filesystem=folder.filesystem).to_pylist()
    execute(shards, here, limit=LIMIT, gallery=COUNT)
    assert sorted(found, key=key_of) == gallery(here)


KILLER = """
import os, sys, time
path, number = sys.argv[1], int(sys.argv[2])
while not os.path.exists(path) or not open(path).read().strip():
    time.sleep(0.01)
time.sleep(0.3)
os.kill(int(open(path).read().split()[0]), number)
"""
