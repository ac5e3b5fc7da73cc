"""Actors that die, hang, do not start; rows that kill them; files that cannot be written."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import png, write_shard
from tests.job.faults import faulty
from trio.errors import UserError
from trio.job import cluster, dispatch, runner
from trio.job.dispatch import JobFailed, Stop, Stopped
from trio.job.settings import made_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
SCHEMA = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PAUSES_S", (0.1,))
    monkeypatch.setattr(dispatch, "DEAD_PAUSE_S", 0.1)
    monkeypatch.setattr(dispatch, "BEAT_EVERY_S", 0.2)


def shard(folder: Path, prompts: Sequence[str], number: int = 0) -> Path:
    rows = [{"id": i, "image": png((i, 0, 0)), "prompt": p} for i, p in enumerate(prompts)]
    return write_shard(folder / f"{number}.parquet", rows, SCHEMA, row_group=10)


def execute(folder: Path, output: Path, factory: Any, **changes: Any) -> dict[str, Any]:
    stop = changes.pop("stop", None)
    values: dict[str, Any] = {"input": (str(folder),), "output": str(output), "retention": 0.25}
    config = made_of(**values | {"rows_per_file": 8, "actors": 1} | changes)
    plan = runner.plan(config, config.input.input)
    resources = cluster.fit(config, attached=True)
    return runner.execute(plan, resources, factory=factory, stop=stop)


def rows(output: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(output / "rows").to_pylist())


def errors(output: Path) -> dict[int, str]:
    """Kind of error by id."""
    return {r["id"]: r["error"].partition(":")[0] for r in rows(output) if r["error"]}


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def run() -> None:
        while not condition():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_units_of_a_killed_actor_are_done_by_others_at_once(tmp_path: Path) -> None:
    shard(tmp_path / "in", [f"p{n}" for n in range(400)])
    starts, seen, out = tmp_path / "starts", tmp_path / "seen", tmp_path / "out"

    def kill() -> None:
        os.kill(int(starts.read_text().splitlines()[0]), signal.SIGKILL)

    when(lambda: len(list((out / "rows").glob("*"))) >= 3, kill)
    factory = faulty(delay_s=0.05, starts=starts, seen=seen)
    summary = execute(tmp_path / "in", out, factory, actors=2)
    got = rows(out)
    assert [r["id"] for r in got] == list(range(400)) and not summary["errors"]
    assert sum(s["images"] for s in pq.read_table(out / "stats").to_pylist()) == 400
    twice = [prompt for prompt, n in Counter(seen.read_text().split()).items() if n > 1]
    assert 0 < len(twice) <= 13 * 8, "more than the units that one actor has in hand"
    done = {r["prompt"]: r["finished_at"] for r in got}
    later = [prompt for prompt in done if done[prompt] > max(done[t] for t in twice)]
    assert len(later) > 20, "they waited for the rest of the input"


@pytest.mark.parametrize(
    "fault",
    [
        "crash",
        pytest.param("kill", marks=pytest.mark.slow),
        pytest.param("break", marks=pytest.mark.slow),
    ],
)
def test_a_row_that_kills_the_process_ends_as_an_error_row(tmp_path: Path, fault: str) -> None:
    prompts = [f"p{n}" for n in range(40)]
    prompts[19] = fault
    shard(tmp_path / "in", prompts)
    out = tmp_path / "out"
    summary = execute(tmp_path / "in", out, faulty())
    assert [r["id"] for r in rows(out)] == list(range(40))
    assert errors(out) == {19: "quarantined"} and summary["errors"] == 1
    bad = rows(out)[19]
    assert bad["prompt"] == fault and "died 2 times while on this row alone" in bad["error"]
    assert sum(s["images"] for s in pq.read_table(out / "stats").to_pylist()) == 39


@pytest.mark.slow
def test_an_engine_in_which_nothing_moves_is_started_anew(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["p0", "hang", "p2"])
    execute(tmp_path / "in", tmp_path / "out", faulty(), stall_timeout=1.0)
    assert errors(tmp_path / "out") == {1: "quarantined"}


def test_engines_that_do_not_start_end_the_run_with_the_reason(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["p0"])
    starts = tmp_path / "starts"
    with pytest.raises(JobFailed, match="failed to start 3 times: RuntimeError: CUDA error: no"):
        execute(tmp_path / "in", tmp_path / "out", faulty(starts=starts, fail=99))
    assert len(starts.read_text().splitlines()) == 3
    summary = execute(tmp_path / "in", tmp_path / "out", faulty(starts=starts, fail=5))
    assert summary["rows"] == 1 and len(starts.read_text().splitlines()) == 6


@pytest.mark.slow
def test_engines_that_die_on_every_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BARREN_DEATHS", 3)
    shard(tmp_path / "in", ["crash"] * 30)
    with pytest.raises(JobFailed, match="engines died 3 times with nothing done"):
        execute(tmp_path / "in", tmp_path / "out", faulty())


def test_stopping_lets_what_is_in_hand_finish(tmp_path: Path) -> None:
    shard(tmp_path / "in", [f"p{n}" for n in range(200)])
    out, seen, stop = tmp_path / "out", tmp_path / "seen", Stop()
    when(lambda: len(list((out / "rows").glob("*"))) >= 2, stop)
    with pytest.raises(Stopped):
        execute(tmp_path / "in", out, faulty(delay_s=0.1, seen=seen), stop=stop)
    done = [r["prompt"] for r in rows(out)]
    assert 16 <= len(done) < 200 and sorted(seen.read_text().split()) == sorted(done)
    assert not (out / "_SUCCESS").exists()
    execute(tmp_path / "in", out, faulty(seen=seen))
    assert [r["id"] for r in rows(out)] == list(range(200))
    assert len(seen.read_text().split()) == 200


@pytest.mark.slow
def test_stopping_waits_no_longer_than_the_grace_period(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["hang"])
    seen, stop = tmp_path / "seen", Stop()
    when(seen.exists, stop)
    began = time.monotonic()
    with pytest.raises(Stopped):
        execute(tmp_path / "in", tmp_path / "out", faulty(seen=seen), stop=stop, grace_period=1.0)
    assert time.monotonic() - began < 60


def test_rows_that_cannot_be_read_become_errors(tmp_path: Path) -> None:
    path = shard(tmp_path / "in", [f"p{n}" for n in range(30)])
    meta = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    at = meta.dictionary_page_offset or meta.data_page_offset
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    shard(tmp_path / "in", ["q0", "q1"], number=1)
    execute(tmp_path / "in", tmp_path / "out", faulty(), rows_per_file=10)
    got = rows(tmp_path / "out")
    assert len(got) == 32
    assert [r["error"] is not None for r in got] == [False] * 10 + [True] * 10 + [False] * 12
    assert got[10]["error"].startswith("shard_unreadable: ShardUnreadable: ")


def rewritten(path: Path) -> None:
    """As many rows as before in the same row groups."""
    shard(path.parent, [f"another {n}" for n in range(30)], number=int(path.stem))


@pytest.mark.parametrize(
    ("fate", "kind"),
    [
        (rewritten, "shard_changed"),
        pytest.param(Path.unlink, "shard_gone", marks=pytest.mark.slow),
    ],
)
def test_a_shard_that_changes_under_way_costs_its_own_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fate: Callable[[Path], None], kind: str
) -> None:
    shard(tmp_path / "in", [f"p{n}" for n in range(200)])
    last, out = shard(tmp_path / "in", [f"q{n}" for n in range(30)], number=1), tmp_path / "out"
    when(lambda: len(list((out / "rows").glob("*"))) >= 1, lambda: fate(last))
    summary = execute(tmp_path / "in", out, faulty(delay_s=0.05))
    got = rows(out)
    assert len({r["row"] for r in got}) == len(got) == 230
    assert [r["row"] for r in got if r["error"]] == [(1 << 32) + n for n in range(30)]
    assert {r["error"].partition(":")[0] for r in got if r["error"]} == {kind}
    assert summary["error_kinds"] == {kind: 30} and (out / "_SUCCESS").exists()
    said = capsys.readouterr().err
    assert said.count("its rows that are not answered yet become errors") == 1


@pytest.mark.slow
def test_an_input_that_is_gone_as_a_whole_ends_the_run(tmp_path: Path) -> None:
    """It may be a mount: what is left must not become errors."""
    # Far more rows than can have been read ahead by the time the first are written.
    paths = [shard(tmp_path / "in", [f"p{n}" for n in range(900)], number=n) for n in range(2)]
    out = tmp_path / "out"

    def unmount() -> None:
        for path in paths:
            path.unlink()

    when(lambda: len(list((out / "rows").glob("*"))) >= 1, unmount)
    with pytest.raises(UserError, match="is gone since the run was planned"):
        execute(tmp_path / "in", out, faulty(delay_s=0.05))
    assert not [r for r in rows(out) if r["error"]]


@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["p0"])
    out, seen = tmp_path / "out", tmp_path / "seen"

    def spoil() -> None:
        (out / "rows").rmdir()
        (out / "rows").touch()

    when(seen.exists, spoil)
    with pytest.raises(JobFailed, match=r"failed 5 times: (FileExists|NotADirectory)Error"):
        execute(tmp_path / "in", out, faulty(delay_s=0.5, seen=seen))


@pytest.mark.slow
def test_a_run_in_which_nearly_everything_fails_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ENOUGH_ROWS", 50)
    shard(tmp_path / "in", [f"{'explode' if n % 4 else 'p'}" for n in range(400)])
    with pytest.raises(JobFailed, match=r"of the first \d+ rows are in error \(prepare_failed "):
        execute(tmp_path / "in", tmp_path / "out", faulty(delay_s=0.05))
    assert 50 <= len(rows(tmp_path / "out")) < 400
    summary = execute(tmp_path / "in", tmp_path / "out", faulty(), max_error_rate=0.8)
    assert summary["errors"] == 300
