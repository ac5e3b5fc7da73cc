"""Uploads, to a stand-in of the hub's API."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from tests.job.compactions import SMALL, UNITS, Steps, commit_long, compact
from tests.job.hub_server import TOKEN, Hub, serving
from tests.job.store import bucket_of
from tests.job.store import serving as serving_s3
from trio.errors import JobFailed, UserError
from trio.job.output import hub_upload, output_directory
from trio.job.storage import Location, locate, write_atomic

FEW = UNITS[:6]
REPOSITORY = "org/captions"
CARD = 'load_dataset(".", split="train") of "."'
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def finished(output: Location) -> Location:
    """A finished run, as far as an upload looks at it."""
    for unit in FEW:
        commit_long(output.uri, unit)
    texts = {"run.yaml": "model: demo\n", "README.md": CARD, "manifest.parquet": "x"}
    texts |= {f"gallery/{FEW[0].name}": "holds images, which stay"}
    for name, text in texts.items():
        write_atomic(output.join(name), text.encode())
    output_directory.close(output, {"rows": 2 * len(FEW)})
    return output


def test_all_that_is_of_use_goes_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    output = finished(locate(str(tmp_path / "out")))
    url = hub_upload.push(output, REPOSITORY, private=True)
    assert url == f"{hub.url}/datasets/{REPOSITORY}" and hub.private == {REPOSITORY: True}
    there = hub.files[REPOSITORY]
    own = {f"{folder}/{unit.name}" for folder in ("rows", "stats") for unit in FEW}
    assert there.keys() == {"README.md", "summary.json", "run.yaml", *own}
    assert there["README.md"] == CARD.replace(".", REPOSITORY, 1).encode()
    for name in own:
        assert there[name] == (tmp_path / "out" / name).read_bytes()
    assert len(hub.commits) == 1 and hub.uploads == len(own)
    hub_upload.push(output, REPOSITORY, private=False)
    assert hub.uploads == len(own) and hub.files[REPOSITORY] == there


def test_rows_that_the_run_no_longer_has_go(hub: Hub, tmp_path: Path) -> None:
    output = finished(locate(str(tmp_path / "out")))
    hub_upload.push(output, REPOSITORY, private=False)
    hub.files[REPOSITORY]["notes.txt"] = b"by hand"
    compact(output, FEW, SMALL, Steps())
    hub_upload.push(output, REPOSITORY, private=False)
    there = hub.files[REPOSITORY]
    assert there["notes.txt"] == b"by hand" and not hub.private[REPOSITORY]
    assert {name for name in there if name.startswith("rows/")} == {
        f"rows/{name}" for name in os.listdir(tmp_path / "out" / "rows")
    }
    assert f"-rows/{FEW[0].name}" in hub.commits[1]


@pytest.mark.parametrize("failing", ["/repos/create", "/objects/", "/commit/"])
def test_an_upload_that_fails_is_tried_again_by_the_same_command(
    hub: Hub, tmp_path: Path, failing: str
) -> None:
    output = finished(locate(str(tmp_path / "out")))
    hub.failing = failing
    with pytest.raises(JobFailed, match=r"rows are written, but not uploaded to .*tries it again"):
        hub_upload.push(output, REPOSITORY, private=False)
    assert not hub.commits
    hub.failing = None
    hub_upload.push(output, REPOSITORY, private=False)
    assert len(hub.commits) == 1


def test_who_may_not_upload_hears_it_before_the_run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_upload.check_access(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--push-to-hub org/captions: the hub does not take"):
        hub_upload.check_access(REPOSITORY)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token; set HF_TOKEN"):
        hub_upload.check_access(REPOSITORY)


@pytest.mark.slow
def test_from_an_object_store(hub: Hub, tmp_path: Path) -> None:
    with serving_s3(tmp_path) as server:
        output = finished(bucket_of(server).at("out"))
        hub_upload.push(output, REPOSITORY, private=False)
    assert hub.uploads == 2 * len(FEW)
    (tmp_path / "rows.parquet").write_bytes(hub.files[REPOSITORY][f"rows/{FEW[1].name}"])
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 2


@pytest.mark.slow
def test_a_job_that_uploads(hub: Hub, tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cache),
    }
    command = [sys.executable, str(ROOT / "jobs" / "caption.py"), "--output", str(out)]
    command += ["--limit", "8", "--rows-per-file", "2", "--push-to-hub", REPOSITORY]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=280
        )

    planned = run("--dry-run")
    assert planned.returncode == 0 and f"go to the data set {REPOSITORY} of" in planned.stdout
    environment["HF_TOKEN"] = "hf_wrong"
    refused = run()
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert not out.exists()
    environment["HF_TOKEN"], hub.failing = TOKEN, "/commit/"
    failed = run()
    assert failed.returncode == 1 and (out / "_SUCCESS").exists()
    assert "tries it again" in failed.stderr.splitlines()[-1]
    hub.failing = None
    again = run()
    assert again.returncode == 0 and "finished already" in again.stdout
    names = hub.files[REPOSITORY].keys()
    assert {"README.md", "summary.json", "run.yaml", "changed.parquet"} <= names
    assert "metrics.json" in names and "rows/0-00000.parquet" in names
    shutil.rmtree(out)
    environment["HF_TOKEN"] = ""
    assert "no token" in run().stderr
