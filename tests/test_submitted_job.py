"""A job submitted to a cluster that has the async library `trio` installed, and us not at all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = ["-P", "-m", "ray.scripts.scripts"]
SCRIPT = """
import _bootstrap
import ray, sys, trio
from trio.job.nodes.environment import cluster_runtime_env

@ray.remote
def work():
    import subprocess, trio
    code = "import trio; print(trio.run(trio.sleep, 0), trio.Pruning.__name__)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return trio.Pruning(retention=0.5).retention, trio.run(trio.sleep, 0), child.stdout.strip()

assert "trio_vlm_path" not in sys.modules
ray.init(runtime_env=cluster_runtime_env() or None, log_to_driver=False)
print("FOUND", trio.run(trio.sleep, 0), ray.get(work.remote()), cluster_runtime_env())
"""
START = """
import _bootstrap
import os, ray, sys
from trio.job.nodes import cluster

@ray.remote
def work():
    given = open("/proc/self/environ").read().split(chr(0))
    return sorted(each for each in given if each.startswith(("OMP_WAIT_POLICY=", "GOMP_SPIN")))

@ray.remote
def priority():
    return os.nice(0)

attached = cluster.start(sys.argv[1] if len(sys.argv) > 1 else None)
assert attached or ray.get(priority.remote()) == os.nice(0)
print("FOUND", attached, ray.get(work.remote()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with everything that is installed here but us: start-up hooks do not carry over."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Keeps the cluster away from any other Ray, whose settings this process may hold; sockets
    want a short path."""
    room = tempfile.mkdtemp(prefix="trio-", dir="/tmp")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith(("RAY_", "OMP_WAIT", "GOMP_"))
    }
    yield {**kept, "RAY_TMPDIR": room, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    shutil.rmtree(room, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(python: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Addresses of a one-node cluster: of its dashboard, and of itself."""
    port, dashboard = free_port(), free_port()
    command = [str(python), *RAY, "start", "--head", "--block", "--num-cpus=2"]
    ports = [f"--port={port}", f"--dashboard-port={dashboard}"]
    # The agent that takes submitted jobs has a fixed port, which another Ray may hold.
    ports += [f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen(
        [*command, *ports],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _await(url + "/api/version", head)
        word = Path(environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
        deadline = time.monotonic() + 60  # what `ray start` does last
        while not word.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield {"dashboard": url, "ray": f"127.0.0.1:{port}"}
    finally:
        # The processes of the head share its session, which is ours.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)


def _await(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head stopped"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("no dashboard within 120 s")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of the repository the script needs."""
    folder = tmp_path_factory.mktemp("checkout")
    leave_out = shutil.ignore_patterns("__pycache__", "model", "data")
    shutil.copytree(ROOT / "trio", folder / "trio", ignore=leave_out)
    (folder / "jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "_bootstrap.py", folder / "jobs")
    (folder / "jobs" / "script.py").write_text(SCRIPT)
    (folder / "jobs" / "start.py").write_text(START)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository with the present changes would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("needs git and a checkout")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(python: Path, environment: dict[str, str], cluster: dict[str, str]) -> Submit:
    """``ray job submit --working-dir . -- python ...`` in a folder."""

    def run(folder: Path, *words: str, job: str) -> subprocess.CompletedProcess[str]:
        options = ["--address", cluster["dashboard"], "--working-dir", ".", "--submission-id", job]
        command = [str(python), *RAY, "job", "submit", *options, "--", str(python), *words]
        # The dashboard answers before the node's agent, which takes the jobs, has reported to it.
        for _ in range(30):
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
            )
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done

    return run


def job_info(cluster: dict[str, str], job: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster['dashboard']}/api/jobs/{job}", timeout=30) as answer:
        info = json.load(answer)
    assert isinstance(info, dict)
    return info


def datasets(cluster: dict[str, str], job: str) -> list[dict[str, Any]]:
    """What the dashboard's panel of Ray Data shows of a job."""
    url = f"{cluster['dashboard']}/api/data/datasets/{job_info(cluster, job)['job_id']}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return list(json.load(answer)["datasets"])


@pytest.mark.slow
@pytest.mark.ray
def test_submitted_with_a_working_directory(checkout: Path, submit: Submit) -> None:
    done = submit(checkout, "jobs/script.py", job="name-clash")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FOUND None (0.5, None, 'None Pruning') {}" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("flag", "variables", "joined", "waits"),
    [
        (None, {}, False, "OMP_WAIT_POLICY=PASSIVE"),
        ("local", {"RAY_ADDRESS": "{ray}", "GOMP_SPINCOUNT": "1000"}, False, "GOMP_SPINCOUNT=1000"),
        ("{ray}", {"RAY_ADDRESS": "local"}, True, "OMP_WAIT_POLICY=PASSIVE"),
        ("auto", {"OMP_WAIT_POLICY": "ACTIVE"}, True, "OMP_WAIT_POLICY=ACTIVE"),
        (None, {"RAY_ADDRESS": "{ray}"}, True, "OMP_WAIT_POLICY=PASSIVE"),
    ],
)
def test_which_ray_is_taken_and_how_its_workers_wait(
    flag: str | None,
    variables: dict[str, str],
    joined: bool,
    waits: str,
    python: Path,
    environment: dict[str, str],
    cluster: dict[str, str],
    checkout: Path,
) -> None:
    """Beside a Ray that somebody has started on this machine."""
    filled = {name: value.format(**cluster) for name, value in variables.items()}
    flags = [flag.format(**cluster)] if flag else []
    done = subprocess.run(
        [str(python), str(checkout / "jobs" / "start.py"), *flags],
        cwd=python.parent,
        env=environment | filled,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"FOUND {joined} ['{waits}']" in done.stdout
    nobody_said = flag is None and "RAY_ADDRESS" not in variables
    assert ("a Ray runs on this machine" in done.stderr) is nobody_said


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_submitted_job_wait_passively(checkout: Path, submit: Submit) -> None:
    done = submit(checkout, "jobs/start.py", job="waiting")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FOUND True ['OMP_WAIT_POLICY=PASSIVE']" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_the_job_from_a_clone(
    clone: Path, submit: Submit, cluster: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--limit", "4", "--output", str(out)]
    done = submit(clone, "jobs/caption.py", *flags, job="good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_info(cluster, "good")["status"] == "SUCCEEDED"
    table = pq.read_table(out / "rows")
    assert table.num_rows == 8 and table.column("error").null_count == 8  # in two settings
    assert (out / "_SUCCESS").exists()
    (dataset,) = datasets(cluster, "good")
    assert dataset["dataset"].startswith("captions ") and " pass 0" in dataset["dataset"]
    names = [stage["name"] for stage in dataset["operators"]]
    assert names == ["Input", "ReadUnits", "MapBatches(prepare)", "MapBatches(answer)"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_broken_argument_is_named_in_the_logs_of_the_job(
    clone: Path, submit: Submit, cluster: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = submit(clone, "jobs/caption.py", "--retention", "7", "--output", str(out), job="bad")
    assert done.returncode == 1
    info = job_info(cluster, "bad")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2)
    with urllib.request.urlopen(f"{cluster['dashboard']}/api/jobs/bad/logs", timeout=30) as answer:
        logs = json.load(answer)["logs"]
    said = [line for line in logs.splitlines() if line.startswith("caption.py: ")]
    assert said == ["caption.py: --retention: must be above 0 and at most 1, got 7"]
    assert "Traceback" not in logs and not out.exists()


def test_what_is_uploaded_is_small(clone: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    (clone / "trio-output").mkdir()
    (clone / "trio-output" / "rows.parquet").write_bytes(b"x")
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(clone), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as file:
        names = set(file.namelist())
    assert {"jobs/caption.py", "trio/__init__.py", "trio/demo/model/config.json"} <= names
    assert not [
        name for name in names if name.startswith(("tests/", "trio-output/", ".git/", ".ci/"))
    ]
    assert package.stat().st_size < 20 << 20


@pytest.mark.slow
@pytest.mark.ray
def test_attached_without_a_working_directory(
    python: Path, environment: dict[str, str], cluster: dict[str, str], checkout: Path
) -> None:
    done = subprocess.run(
        [str(python), str(checkout / "jobs" / "script.py")],
        cwd=python.parent,
        env={**environment, "RAY_ADDRESS": cluster["ray"]},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FOUND None (0.5, None, 'None Pruning') {'py_modules'" in done.stdout


def test_this_python_has_the_library_and_not_us(python: Path, environment: dict[str, str]) -> None:
    command = [str(python), "-P", "-c", "import trio; print(trio.__file__)"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert Path(out.stdout.strip()).is_relative_to(sysconfig.get_path("purelib"))
    assert sys.prefix != str(python.parents[1])
