"""Metrics as Prometheus would read them from a Ray cluster, and the summary of the same run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.bundled import SHARD
from trio.job.live.prometheus import COUNTERS, ERRORS, NAMES, OF_ENGINES, SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[3]
SAMPLE = re.compile(r"^ray_(trio_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
COPIES, BROKEN = 2, 5
LATE_S = 30.0
"""Until the last figures must be there."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Scraper:
    """What a node's metrics port says of our metrics."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> list[tuple[str, dict[str, str], float]]:
        """Name, labels and value of each sample; none where nobody answers."""
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, OSError):
            return []
        return [(n, dict(LABEL.findall(of)), float(v)) for n, of, v in SAMPLE.findall(text)]

    def sums(self, *labels: str) -> Mapping[tuple[str, ...], float]:
        """Summed over all other labels than these."""
        out: dict[tuple[str, ...], float] = defaultdict(float)
        for name, of, value in self.read():
            out[(name, *(of.get(label, "") for label in labels))] += value
        return out


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    room = tempfile.mkdtemp(prefix="trio-", dir="/tmp")  # sockets want a short path
    kept = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    kept |= {"RAY_TMPDIR": room, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    kept |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    yield kept | {"RAY_metrics_report_interval_ms": "1000"}
    shutil.rmtree(room, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[tuple[str, Scraper]]:
    """Address of a one-node cluster, and its metrics."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    flags = ["--num-cpus=4", f"--port={port}", f"--metrics-export-port={metrics}"]
    flags += ["--include-dashboard=false", f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen(
        [*command, *flags],
        env=environment,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        word = Path(environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
        while not word.exists():  # what `ray start` does last
            assert head.poll() is None and time.monotonic() < deadline, "the head did not start"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", Scraper(metrics)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)  # the processes of the head share its session
        head.wait(30)


def shard(path: Path, copies: int, broken: int) -> Path:
    """Rows of the bundled shard several times over, and images that are none."""
    table = pq.read_table(SHARD, columns=["image", "prompt"])
    bad = [{"image": {"bytes": b"none", "path": "none"}, "prompt": "x"}] * broken
    tables = [*[table] * copies, pa.Table.from_pylist(bad, schema=table.schema)]
    pq.write_table(pa.concat_tables(tables), path)
    return path


def awaited(scraper: Scraper, rows: float) -> Mapping[tuple[str, ...], float]:
    """The sums, when so many rows stand in them."""
    deadline = time.monotonic() + LATE_S
    while (sums := scraper.sums()).get(("trio_rows_total",)) != rows:
        assert time.monotonic() < deadline, f"{rows} rows are not there: {dict(sums)}"
        time.sleep(0.5)
    return sums


def test_what_is_scraped_at_the_end_is_what_the_summary_says(
    cluster: tuple[str, Scraper], environment: dict[str, str], tmp_path: Path
) -> None:
    address, scraper = cluster
    out, rows = tmp_path / "out", shard(tmp_path / "rows.parquet", COPIES, BROKEN)
    command = [sys.executable, "jobs/caption.py", "--address", address, "--input", str(rows)]
    command += ["--output", str(out), "--retention", "0.25", "--actors", "2"]
    command += ["--rows-per-file", "16"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seen: list[Mapping[tuple[str, ...], float]] = []
    while process.poll() is None:
        seen.append(scraper.sums())
        time.sleep(0.5)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    sums = awaited(scraper, summary["rows"])
    for counter in COUNTERS:
        value = summary["phases"].get(counter.field, summary.get(counter.field))
        assert sums.get((counter.name,), 0.0) == pytest.approx(value, rel=1e-9), counter.name
    spent = sum(summary["phases"][f"{name}_s"] for name in ("encode", "prefill", "decode"))
    spent += summary["phases"]["preprocess_wait_s"] + summary["phases"]["idle_s"]
    assert sums[(SECONDS,)] == pytest.approx(spent, rel=1e-6)
    kinds = {k[1]: v for k, v in scraper.sums("kind").items() if k[0] == ERRORS}
    assert kinds == summary["error_kinds"] and sum(kinds.values()) == BROKEN
    runs = {of["run"] for _, of, _ in scraper.read()}
    assert runs == {summary["run"]}
    engines = {of["engine"] for name, of, _ in scraper.read() if name == "trio_rows_total"}
    assert engines == {"1", "2"}
    during = [figures for figures in seen if ("trio_rows_left",) in figures]
    assert len(during) >= 2, "nothing was to be seen while the run lasted"
    assert max(figures.get(("trio_engines_working",), 0) for figures in during) == 2
    assert max(figures.get(("trio_running_requests",), 0) for figures in during) > 0
    growing = [figures.get(("trio_rows_total",), 0) for figures in seen]
    assert growing == sorted(growing) and growing[-1] <= summary["rows"]
    names = {name for figures in seen for (name,) in figures}
    assert names >= NAMES - {ERRORS, "trio_out_of_memory_total"}
    assert {name for name, _ in OF_ENGINES.values()} <= names
