"""A job under fire: started, watched by what it has committed, hit, resumed, and checked."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from tests.chaos.engine import ANSWERS, ENGINES, HANGS, Options
from tests.job.fakes import png, write_shard
from trio.job.input.units import Unit
from trio.job.resume import committed
from trio.job.storage import locate

ROOT = Path(__file__).resolve().parents[2]
MARK = "TRIO_CHAOS"
# in the environment of every process of a test's cluster and of its drivers
RUN_S = 240.0
# longest that one driver may take
GONE_S = 40.0
# in which engines and their helpers must be gone once their driver is
POLL_S = 0.01
SCHEMA = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])
EXPECTED = re.compile(
    r"^ray::IDLE|^ray::\w+Agent$|raylet|gcs_server|ray/dashboard|ray/_private|ray/autoscaler"
    r"|default_worker\.py|setup_worker\.py|s3_server\.py"
    # three actors that Ray Data leaves on a cluster, for all jobs to come
    r"|^ray::(_StatsActor|ActorLocationTracker|_AutoscalingCoordinatorActor)\b"
)


def seeds(count: int | None = None) -> list[int]:
    """Seeds of a case's runs: CHAOS_RUNS of them (20) or ``count``, from CHAOS_SEED (0) on."""
    runs = int(os.environ.get("CHAOS_RUNS", 20))
    first = int(os.environ.get("CHAOS_SEED", 0))
    return list(range(first, first + (runs if count is None else min(count, runs))))


def write_input(
    folder: Path,
    begins: Mapping[str, str | int],
    *,
    shards: int = 4,
    rows: int = 60,
    padding: int = 0,
) -> list[str]:
    """Shards of small images; returns each row's answer in order of its id.

    Args:
        folder: gets the shards.
        begins: for the row ``r<id>`` another beginning of its prompt than "row", or another blue
            of its image than 0.
        shards: how many files.
        rows: of each file.
        padding: bytes of nothing behind each image.
    """
    expected = []
    for shard in range(shards):
        entries = []
        for index in range(rows):
            number = shard * rows + index
            odd = begins.get(f"r{number}", 0)
            begin, blue = ("row", odd) if isinstance(odd, int) else (odd, 0)
            colour = (index, shard, blue)
            image = png(colour) + os.urandom(padding)
            entries.append({"id": number, "image": image, "prompt": f"{begin} {number}"})
            expected.append(f"{begin} {number} [{colour}]")
        write_shard(folder / f"{shard}.parquet", entries, SCHEMA, row_group=15)
    return expected


@dataclass(frozen=True, slots=True)
class EngineMark:
    """A process that has begun to build an engine."""

    pid: int
    node: str

    @property
    def alive(self) -> bool:
        return alive(self.pid)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a driver ended."""

    code: int
    said: str
    # both of its streams


@dataclass(kw_only=True)
class Trial:
    """One job on one cluster, over as many drivers as it takes."""

    address: str
    # of the cluster
    folder: Path
    # for input, logs and what engines leave
    expected: Sequence[str]
    output: str
    flags: Sequence[str] = ()
    source: str = ""
    # of the rows; the folder's own shards where empty
    options: Options = field(init=False)
    drivers: int = 0

    def __post_init__(self) -> None:
        self.options = Options(side=str(self.folder / "side"))

    def with_options(self, **changes: Any) -> Trial:
        self.options = dataclasses.replace(self.options, **changes)
        return self

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        """A driver of the job; the first begins it, later ones go on with it."""
        options = json.dumps(dataclasses.asdict(self.options))
        self.drivers += 1
        command = [sys.executable, "-m", "tests.chaos.driver", options]
        command += ["--input", self.source or str(self.folder / "in"), "--output", self.output]
        command += ["--actors", "2", "--gpus-per-actor", "0", "--rows-per-file", "5"]
        with self._log().open("wb") as log:
            return subprocess.Popen(
                [*command, *self.flags, *flags],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": self.address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self) -> Path:
        return self.folder / f"driver-{self.drivers}.log"

    def said(self) -> str:
        """What the present driver has printed so far."""
        return self._log().read_text(errors="replace")

    def end(self, driver: subprocess.Popen[bytes], timeout: float = RUN_S) -> Ended:
        """Wait for a driver; one that does not end is killed and fails the test."""
        try:
            code = driver.wait(timeout)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            tail = self.said()[-4000:]
            raise AssertionError(f"the driver hung for {timeout} s; it said: {tail}") from None
        return Ended(code, self.said())

    def run(self, *flags: str) -> Ended:
        return self.end(self.start(*flags))

    def finish(self) -> None:
        """Run the job to its end, which must be a good one."""
        ended = self.run()
        assert ended.code == 0, ended.said[-4000:]

    def committed(self) -> int:
        return len(self.units())

    def units(self) -> set[Unit]:
        """Those that are committed."""
        return committed.listed(locate(self.output))

    def _names(self, folder: str) -> list[str]:
        out = locate(self.output)
        selector = pafs.FileSelector(out.join(folder).path, allow_not_found=True)
        names = [info.base_name for info in out.filesystem.get_file_info(selector) if info.is_file]
        return [name for name in names if not name.startswith((".", "_"))]

    def wait_for(self, count: int, driver: subprocess.Popen[bytes]) -> bool:
        """Until so many files are committed; False when the driver has ended before."""
        return self.until(lambda: self.committed() >= count, driver)

    def until(
        self, reached: Callable[[], bool], driver: subprocess.Popen[bytes], timeout: float = RUN_S
    ) -> bool:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if driver.poll() is not None:
                return False
            if reached():
                return True
            time.sleep(POLL_S)
        driver.kill()
        raise AssertionError(f"not reached within {timeout} s: {self.end(driver).said[-4000:]}")

    def moments(self, rng: random.Random, count: int) -> list[int]:
        """Random numbers of committed files at which to strike, in order."""
        units = len(self.expected) // 5
        return sorted(rng.randrange(units) for _ in range(count))

    def engines(self) -> list[EngineMark]:
        """Every process that has had an engine, in the order of their starts."""
        return self._marks(ENGINES)

    def hangs(self) -> list[EngineMark]:
        """Those of them that have come to a step that never ends, in that order."""
        return self._marks(HANGS)

    def _marks(self, kind: str) -> list[EngineMark]:
        paths = sorted((self.folder / "side" / kind).glob("[!.]*.json"))
        return [EngineMark(**json.loads(path.read_text())) for path in paths]

    def kill_engine(self, rng: random.Random, driver: subprocess.Popen[bytes]) -> int | None:
        """SIGKILL to one of the processes that have an engine now; its id, None if none is left."""
        living: list[EngineMark] = []

        def there() -> bool:
            living[:] = [engine for engine in self.engines() if engine.alive]
            return bool(living)

        if not self.until(there, driver):
            return None
        pid = rng.choice(living).pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_pass(self, driver: subprocess.Popen[bytes]) -> bool:
        """SIGKILL to the actor that owns the pass under way; False if none comes any more."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid, line in marked().items() if line.startswith("ray::Pass")]
            return bool(found)

        if not self.until(there, driver):
            return False
        os.kill(found[0], signal.SIGKILL)
        return True

    def answers(self) -> Counter[str]:
        """How often each answer was given, whether or not it was committed."""
        out: Counter[str] = Counter()
        for path in (self.folder / "side" / ANSWERS).glob("*.txt"):
            out.update(path.read_text().splitlines())
        return out

    def check(self, errors: Mapping[int, str] | None = None) -> dict[str, Any]:
        """That every row is there once and right, and that nothing is left over.

        Args:
            errors: kinds of the rows (by id) that must be error rows; all others must be good.

        Returns:
            What the trial cost: drivers, engines, rows answered more than once.
        """
        errors = errors or {}
        rows, stats, summary = self._rows(), self.stats(), self._summary()
        ids = [row["id"] for row in rows]
        assert sorted(ids) == list(range(len(self.expected))), _differences(ids, self.expected)
        assert len({row["row"] for row in rows}) == len(rows)
        for row in rows:
            kind = errors.get(row["id"])
            if kind is None:
                assert (row["response"], row["error"]) == (self.expected[row["id"]], None)
            else:
                assert row["finish_reason"] == "error" and row["error"].startswith(kind), row
        good = len(rows) - len(errors)
        assert sum(entry["images"] for entry in stats.to_pylist()) == good
        assert sorted(stats["unit"].to_pylist()) == sorted(unit.stem for unit in self.units())
        assert (summary["rows"], summary["errors"]) == (len(rows), len(errors))
        assert self._exists("_SUCCESS")
        self._nothing_left_running()
        answers = self.answers()
        extra = sum(answers.values()) - good
        assert all(answers[self.expected[i]] for i in range(len(rows)) if i not in errors)
        assert self._temporary() == []
        return {
            "drivers": self.drivers,
            "engines": len(self.engines()),
            "rows": len(rows),
            "answered_again": extra,
        }

    def stats(self) -> pa.Table:
        """A row for each unit."""
        return self._table("stats")

    def _rows(self) -> list[dict[str, Any]]:
        table = self._table("rows")
        return list(table.select(["row", "id", "response", "error", "finish_reason"]).to_pylist())

    def _table(self, folder: str) -> pa.Table:
        out = locate(self.output)
        names = sorted(self._names(folder))
        paths = [out.join(folder, name).path for name in names]
        return pa.concat_tables([pq.read_table(p, filesystem=out.filesystem) for p in paths])

    def _summary(self) -> dict[str, Any]:
        out = locate(self.output).join("summary.json")
        with out.filesystem.open_input_stream(out.path) as stream:
            loaded = json.loads(stream.read())
        assert isinstance(loaded, dict)
        return loaded

    def _exists(self, name: str) -> bool:
        out = locate(self.output).join(name)
        return bool(out.filesystem.get_file_info(out.path).is_file)

    def _temporary(self) -> list[str]:
        out = locate(self.output)
        infos = out.filesystem.get_file_info(pafs.FileSelector(out.path, recursive=True))
        return [info.path for info in infos if info.path.endswith(".tmp")]

    def _nothing_left_running(self) -> None:
        """Engines end with their driver, and with them whatever they have started."""
        deadline = time.monotonic() + GONE_S
        while True:
            engines = [engine.pid for engine in self.engines() if engine.alive]
            others = strangers()
            if not engines and not others:
                return
            assert time.monotonic() < deadline, f"left running: engines {engines}, {others}"
            time.sleep(0.2)


def _differences(ids: Sequence[int], expected: Sequence[str]) -> str:
    missing = sorted(set(range(len(expected))) - set(ids))
    twice = sorted(number for number, count in Counter(ids).items() if count > 1)
    return f"missing {missing[:10]} ({len(missing)}), twice {twice[:10]} ({len(twice)})"


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def marked() -> dict[int, str]:
    """Command lines of all processes that this test's cluster and drivers have started, by id."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    out = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                out[int(entry.name)] = line.strip()
        except OSError:  # it has ended, or is another user's
            continue
    return out


def strangers() -> dict[int, str]:
    """Those of them that are neither part of an idle Ray nor the store."""
    return {pid: line[:200] for pid, line in marked().items() if not EXPECTED.search(line)}


def report(case: str, seed: int, cost: Mapping[str, Any]) -> None:
    """Say what a trial cost, and append it to the file CHAOS_REPORT if that is set."""
    line = json.dumps({"case": case, "seed": seed, **cost})
    print(line)
    if path := os.environ.get("CHAOS_REPORT"):
        with open(path, "a") as stream:
            stream.write(line + "\n")
