"""Processes that die, hang, do not start; rows that kill them; files that cannot be written."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import png, write_shard
from tests.job.faults import BAD_COLOUR, DeadlyReader, deadly, faulty
from tests.job.runs import execute, rows
from trio.errors import JobFailed, UserError
from trio.job import passes, runner
from trio.job.passes import Stop, Stopped

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
SCHEMA = pa.schema([("id", pa.int32()), ("image", pa.binary()), ("prompt", pa.string())])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAUSES_S", (0.1,) * 4)


def shard(
    folder: Path, prompts: Sequence[str], number: int = 0, *, bad: Sequence[int] = ()
) -> Path:
    """`bad` rows have the colour that kills who prepares them."""
    rows = [
        {"id": i, "image": png(BAD_COLOUR if i in bad else (i % 250, 0, 0)), "prompt": p}
        for i, p in enumerate(prompts)
    ]
    return write_shard(folder / f"{number}.parquet", rows, SCHEMA, row_group=10)


def prompts(count: int, **others: str) -> list[str]:
    """p0, p1, ...; `others` are those of some rows: `at19="crash"`."""
    return [others.get(f"at{n}", f"p{n}") for n in range(count)]


def errors(output: Path) -> dict[int, str]:
    """Kind of error by id."""
    return {r["id"]: r["error"].partition(":")[0] for r in rows(output) if r["error"]}


def written(output: Path) -> int:
    return len(list((output / "rows").glob("*")))


def when(condition: Callable[[], bool], action: Callable[[], object]) -> None:
    """Do something as soon as a condition holds."""

    def run() -> None:
        while not condition():
            time.sleep(0.01)
        action()

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.slow
def test_what_a_killed_engine_held_is_done_again_and_all_else_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "in", prompts(400))
    starts, seen, out = tmp_path / "starts", tmp_path / "seen", tmp_path / "out"

    def kill() -> None:
        os.kill(int(starts.read_text().splitlines()[0]), signal.SIGKILL)

    when(lambda: written(out) >= 3, kill)
    factory = faulty(delay_s=0.05, starts=starts, seen=seen)
    summary = execute(tmp_path / "in", out, factory, actors=2)
    got = rows(out)
    assert [r["id"] for r in got] == list(range(400)) and not summary["errors"]
    assert sum(s["images"] for s in pq.read_table(out / "stats").to_pylist()) == 400
    twice = {prompt for prompt, n in Counter(seen.read_text().split()).items() if n > 1}
    again = {r["prompt"] for r in got if " pass 1 " in r["actor"]}
    assert 0 < len(again) <= 13 * 8, "more than the units that one engine has in hand"
    assert twice <= again, "something else was done twice"
    said = capsys.readouterr().err
    assert "an engine died" in said and "lost with a process" in said


def assert_quarantined(output: Path, bad: dict[int, str], count: int) -> None:
    """Exactly these rows are in error, with their id and prompt."""
    assert [r["id"] for r in rows(output)] == list(range(count))
    assert errors(output) == dict.fromkeys(bad, "quarantined")
    for row in rows(output):
        if row["id"] in bad:
            assert row["prompt"] == bad[row["id"]]
            assert "died 2 times while on this row alone" in row["error"]
    assert sum(s["images"] for s in pq.read_table(output / "stats").to_pylist()) == count - len(bad)


@pytest.mark.slow
def test_rows_that_kill_reader_preparation_and_engine_end_as_error_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "Pass", DeadlyReader)
    shard(tmp_path / "in", prompts(80, at19="crash", at47="doom"), bad=[70])
    out = tmp_path / "out"
    summary = execute(tmp_path / "in", out, faulty(), preprocessor=deadly)
    assert_quarantined(out, {19: "crash", 47: "doom", 70: "p70"}, 80)
    assert summary["error_kinds"] == {"quarantined": 3}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "break"])
def test_a_row_that_kills_its_engine_in_other_ways(tmp_path: Path, fault: str) -> None:
    shard(tmp_path / "in", prompts(40, at19=fault))
    execute(tmp_path / "in", tmp_path / "out", faulty())
    assert_quarantined(tmp_path / "out", {19: fault}, 40)


@pytest.mark.slow
def test_an_engine_in_which_nothing_moves_is_started_anew(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["p0", "hang", "p2"])
    execute(tmp_path / "in", tmp_path / "out", faulty(), stall_timeout=1.0)
    assert_quarantined(tmp_path / "out", {1: "hang"}, 3)


@pytest.mark.slow
def test_passes_in_which_nothing_moves_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watch of the engine itself sleeps: nothing is known of the rows, and none is given up."""
    monkeypatch.setattr(runner, "STILL_S", -3590.0)
    shard(tmp_path / "in", ["p0", "hang", "p2"])
    changes: dict[str, Any] = {"stall_timeout": 3590.0, "row_timeout": 3.0}
    with pytest.raises(JobFailed, match="3 passes in a row were lost"):
        execute(tmp_path / "in", tmp_path / "out", faulty(), **changes)
    assert "nothing moved for" in capsys.readouterr().err


@pytest.mark.slow
def test_engines_that_do_not_start_end_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PAUSES_S", (0.1, 0.1, 60.0))
    shard(tmp_path / "in", ["p0"])
    starts = tmp_path / "starts"
    with pytest.raises(JobFailed, match="failed to start 3 times: RuntimeError: CUDA error: no"):
        execute(tmp_path / "in", tmp_path / "out", faulty(starts=starts, fail=99))
    assert len(starts.read_text().splitlines()) == 3


@pytest.mark.slow
def test_an_engine_that_starts_at_last_answers(tmp_path: Path) -> None:
    shard(tmp_path / "in", ["p0"])
    starts = tmp_path / "starts"
    summary = execute(tmp_path / "in", tmp_path / "out", faulty(starts=starts, fail=2))
    assert summary["rows"] == 1 and len(starts.read_text().splitlines()) == 3


@pytest.mark.slow
def test_engines_that_die_on_every_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BARREN_DEATHS", 3)
    shard(tmp_path / "in", ["crash"] * 60)
    with pytest.raises(JobFailed, match="engines died 3 times with nothing done"):
        execute(tmp_path / "in", tmp_path / "out", faulty())


@pytest.mark.parametrize(
    ("made", "stage"),
    [
        ({"factory": faulty(odd_counters=True)}, "answer: TypeError: "),
        pytest.param({"preprocessor": partial(deadly, odd=True)}, "prepare: AttributeError: ",
                     marks=pytest.mark.slow),
        pytest.param({"preprocessor": partial(deadly, fail=True)},
                     "no preprocessor: RuntimeError: ", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_mistake_of_a_stage_is_no_rows_and_ends_the_run(
    tmp_path: Path, made: dict[str, Any], stage: str
) -> None:
    shard(tmp_path / "in", ["p0"])
    with pytest.raises(JobFailed, match=f"^{stage}"):
        execute(tmp_path / "in", tmp_path / "out", **({"factory": faulty()} | made))
    assert written(tmp_path / "out") == 0


@pytest.mark.slow
def test_stopping_lets_what_is_in_hand_finish(tmp_path: Path) -> None:
    shard(tmp_path / "in", prompts(200))
    out, seen, stop = tmp_path / "out", tmp_path / "seen", Stop()
    when(lambda: written(out) >= 2, stop)
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


def test_rows_that_cannot_be_read_become_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row group that is damaged, and a shard that is another one, as large, when it is read."""
    path = shard(tmp_path / "in", prompts(30))
    meta = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    at = meta.dictionary_page_offset or meta.data_page_offset
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    other, out = shard(tmp_path / "in", prompts(20), number=1), tmp_path / "out"

    def rewrite() -> None:
        shard(tmp_path / "in", [f"another {n}" for n in range(20)], number=1)

    summary = execute(tmp_path / "in", out, faulty(), rows_per_file=10, planned=rewrite)
    kinds = [(r["error"] or "").partition(":")[0] for r in rows(out)]
    assert kinds == [""] * 10 + ["shard_unreadable"] * 10 + [""] * 10 + ["shard_changed"] * 20
    assert summary["error_kinds"] == {"shard_changed": 20, "shard_unreadable": 10}
    said = capsys.readouterr().err
    assert said.count(f"{other}: the shard has changed") >= 1
    assert said.count("its rows that are not answered yet become errors") == 1


@pytest.mark.slow
def test_a_shard_that_is_gone_costs_its_own_rows(tmp_path: Path) -> None:
    shard(tmp_path / "in", prompts(40))
    last, out = shard(tmp_path / "in", [f"q{n}" for n in range(30)], number=1), tmp_path / "out"
    summary = execute(tmp_path / "in", out, faulty(), planned=last.unlink, columns="id=none")
    assert [r["row"] for r in rows(out) if r["error"]] == [(1 << 32) + n for n in range(30)]
    assert summary["error_kinds"] == {"shard_gone": 30} and (out / "_SUCCESS").exists()


@pytest.mark.slow
def test_an_input_that_is_gone_as_a_whole_ends_the_run(tmp_path: Path) -> None:
    """It may be a mount: what is left must not become errors."""
    # Far more rows than can have been read ahead by the time the first are written.
    paths = [shard(tmp_path / "in", prompts(900), number=n) for n in range(2)]
    out = tmp_path / "out"

    def unmount() -> None:
        for path in paths:
            path.unlink()

    when(lambda: written(out) >= 1, unmount)
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
