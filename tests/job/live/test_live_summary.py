"""summary.json while a run lasts, and what a run that ends badly leaves in it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import png, write_shard
from tests.job.faults import faulty
from tests.job.runs import execute
from trio.errors import JobFailed, UserError
from trio.job.live import live_summary
from trio.job.live.live_summary import INTERVAL_S, LiveSummary, why
from trio.job.output import output_directory
from trio.job.passes import Stop, Stopped
from trio.job.resume import lease
from trio.job.storage import locate

SCHEMA = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run that counts how often it is asked for its figures."""

    def __init__(self, output: Path) -> None:
        self.rows, self.said, self.clock = 0, list[str](), Clock()
        self.output = output

    def figures(self, state: str) -> dict[str, Any]:
        self.rows += 1
        return {"state": state, "rows": self.rows}

    def begin(self, live: LiveSummary) -> None:
        live.begin(self.figures, self.said.append)

    def later(self, live: LiveSummary, seconds: float = INTERVAL_S + 1) -> None:
        live.rest()
        self.clock.now += seconds
        live.look()
        live.rest()

    def ends(
        self,
        held: lease.Held,
        error: BaseException,
        before: Callable[[LiveSummary], None] = lambda live: None,
    ) -> None:
        """It begins and ends by an exception, and `before` that something happens."""
        with LiveSummary(locate(str(self.output)), held, clock=self.clock) as live:
            self.begin(live)
            before(live)
            raise error

    def summary(self) -> dict[str, Any] | None:
        path = self.output / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[lease.Held]:
    with lease.hold(locate(str(tmp_path)), interval_s=0.05, expiry_s=0.2) as held:
        yield held


def test_it_is_written_at_once_and_then_every_interval(run: Run, held: lease.Held) -> None:
    output = locate(str(run.output))
    with LiveSummary(output, held, clock=run.clock) as live:
        live.look()
        assert run.summary() is None
        run.begin(live)
        live.rest()
        assert run.summary() == {"state": "running", "rows": 1}
        run.later(live, INTERVAL_S - 1)
        assert run.summary() == {"state": "running", "rows": 1}
        run.later(live)
        assert run.summary() == {"state": "running", "rows": 2}
    assert run.summary() == {"state": "running", "rows": 2} and not run.said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (JobFailed("no engine\nstarts"), "no engine"),
        (UserError("--model x: no model there"), "--model x: no model there"),
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(1), "stopped"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_a_run_that_fails_leaves_its_totals_and_why(
    run: Run, held: lease.Held, error: BaseException, said: str
) -> None:
    with pytest.raises(type(error)):
        run.ends(held, error)
    assert run.summary() == {"state": "failed", "rows": 2, "why": said} and why(error) == said


def test_a_run_that_fails_before_its_directory_is_claimed_writes_nothing(
    run: Run, held: lease.Held
) -> None:
    with pytest.raises(JobFailed), LiveSummary(locate(str(run.output)), held):
        raise JobFailed("too early")
    assert run.summary() is None


def test_a_run_that_lost_its_lease_writes_no_more(run: Run, held: lease.Held) -> None:
    """Neither its totals so far nor its end: they would stand in another run's place."""

    def lose(live: LiveSummary) -> None:
        live.rest()
        (run.output / "summary.json").unlink()
        shutil.rmtree(run.output / ".lease")
        _until_lost(held)
        run.later(live)
        assert run.summary() is None

    with pytest.raises(lease.LeaseLost):
        run.ends(held, lease.LeaseLost("taken over"), lose)
    assert run.summary() is None
    with pytest.raises(JobFailed):
        run.ends(held, JobFailed("another reason"))
    assert run.summary() is None and not run.said


def _until_lost(held: lease.Held) -> None:
    held._thread.join(timeout=10)  # it ends when the claim is found to be gone
    assert not held._thread.is_alive()


def test_a_storage_that_does_not_take_it_is_told_of_once(run: Run, held: lease.Held) -> None:
    (run.output / "summary.json").mkdir()
    with LiveSummary(locate(str(run.output)), held, clock=run.clock) as live:
        run.begin(live)
        run.later(live)
        (said,) = run.said
        assert said.startswith("summary.json could not be refreshed (") and "30 s" in said
        (run.output / "summary.json").rmdir()
        run.later(live)
        assert run.summary() == {"state": "running", "rows": 3} and len(run.said) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_run_says_how_far_it_is_then_why_it_stopped_then_that_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_summary, "INTERVAL_S", 0.0)
    rows = [{"id": n, "image": png((n, 0, 0)), "prompt": f"p{n}"} for n in range(200)]
    write_shard(tmp_path / "in" / "0.parquet", rows, SCHEMA)
    out, stop = tmp_path / "out", Stop()
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(live_summary, "write_summary", _watching(seen, stop))
    with pytest.raises(Stopped):
        execute(tmp_path / "in", out, faulty(delay_s=0.1), stop=stop, grace_period=30.0)
    first, *_, last = seen
    assert first["rows"] == 0 and {s["state"] for s in seen[:-1]} == {"running"}
    left = output_directory.read_summary(locate(str(out)))
    assert left == last and left["state"] == "failed" and left["why"].startswith("stopped; ")
    assert 8 <= left["rows"] == pq.read_table(out / "rows").num_rows < 200
    assert not output_directory.finished(locate(str(out)))
    summary = execute(tmp_path / "in", out, faulty())
    again = output_directory.read_summary(locate(str(out)))
    assert again == summary and again["state"] == "done" and again["rows"] == 200
    assert again["rows_before"] == left["rows"] and "why" not in again
    running = [s for s in seen if s["state"] == "running"]
    assert again.keys() - {"duplicate_ids"} == running[-1].keys()


def _watching(seen: list[dict[str, Any]], stop: Callable[[], None]) -> Callable[..., None]:
    """Writes the summary, and stops the run when rows stand in it."""

    def write(output: Any, summary: dict[str, Any]) -> None:
        seen.append(json.loads(json.dumps(summary)))
        output_directory.write_summary(output, summary)
        if summary["rows"]:
            stop()

    return write
