"""One run at a time: real processes that start together, are killed, stopped and continued."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from trio.errors import UserError
from trio.job.resume import lease
from trio.job.storage import locate

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, RIVALS = 25, 3
HOLDER = """
import sys, time
from trio.job.resume import lease
from trio.job.storage import locate
with lease.hold(locate(sys.argv[1]), interval_s=0.2, expiry_s=1.0) as held:
    print("holds", flush=True)
    while True:
        time.sleep(0.05)
        try:
            held.check()
        except lease.LeaseLost as error:
            print("lost", error, flush=True)
            break
"""


@pytest.fixture
def start() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds the lease until it loses it."""
    started = []

    def begin(out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(out)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def hold(out: Path, say: Callable[[str], object] = print) -> Any:
    return lease.hold(locate(str(out)), interval_s=0.2, expiry_s=1.0, say=say)


def claims(out: Path) -> list[Path]:
    return sorted((out / ".lease").glob("*.claim"))


def test_it_is_held_while_the_block_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as held:
        (claim,) = claims(tmp_path / "out")
        said = json.loads(claim.read_text())
        assert said["pid"] == os.getpid() and said["host"] and said["started_at"]
        before = claim.stat().st_mtime_ns
        beat = claim.with_suffix(".beat")
        first = beat.stat().st_mtime_ns
        time.sleep(0.5)
        held.check()
        assert claim.stat().st_mtime_ns == before and beat.stat().st_mtime_ns > first
    assert os.listdir(tmp_path / "out") == []


def test_a_second_run_is_refused_and_told_who_is_there(
    tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
) -> None:
    process = start(tmp_path)
    said: list[str] = []
    with (
        pytest.raises(UserError, match=rf"in use by process {process.pid} on .* started 20"),
        hold(tmp_path, said.append),
    ):
        pass
    assert said == []  # nothing to wait for
    assert len(claims(tmp_path)) == 1


def test_a_killed_run_is_taken_over_at_once(
    tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
) -> None:
    process = start(tmp_path)
    process.kill()
    process.wait()
    said: list[str] = []
    with lease.hold(locate(str(tmp_path)), say=said.append) as held:
        held.check()
        assert len(claims(tmp_path)) == 1
    assert said == []


def test_a_stopped_run_that_goes_on_later_has_lost_the_lease(
    tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
) -> None:
    process = start(tmp_path)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="in use"), hold(tmp_path):
        pass
    time.sleep(1.2)
    with hold(tmp_path) as held:
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None and "lost the lease" in process.stdout.readline()
        assert process.wait(timeout=10) == 0
        held.check()
        assert len(claims(tmp_path)) == len(list((tmp_path / ".lease").glob("*.beat"))) == 1


def foreign(out: Path) -> Path:
    """A claim of another machine."""
    path = out / ".lease" / "other.claim"
    path.parent.mkdir(parents=True)
    owner = lease.process_identity() | {"host": "far", "machine": "another", "pid": 1}
    path.write_text(json.dumps(owner))
    return path


def test_a_silent_run_elsewhere_is_waited_for(tmp_path: Path) -> None:
    foreign(tmp_path)
    said: list[str] = []
    began = time.monotonic()
    with hold(tmp_path, said.append):
        assert time.monotonic() - began > 0.9
    assert len(said) == 1 and "process 1 on far" in said[0] and "waiting for up to 1 s" in said[0]


def test_a_run_elsewhere_that_is_long_dead_is_not_waited_for(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    os.utime(path, (time.time() - 100, time.time() - 100))
    said: list[str] = []
    with hold(tmp_path, said.append):
        assert said == []


def test_a_run_elsewhere_that_beats_is_left_alone(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            path.with_suffix(".beat").write_text("")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 1 on far"), hold(tmp_path):
            pass
    finally:
        done.set()
        thread.join()
    assert claims(tmp_path) == [path]


def test_a_younger_claim_is_waited_for_and_does_not_win(tmp_path: Path) -> None:
    """As when both wrote theirs at the same time, and ours is a moment older."""
    path = foreign(tmp_path)
    os.utime(path, (time.time() + 50, time.time() + 50))
    timer = threading.Timer(0.5, path.unlink)
    timer.start()
    began = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - began > 0.4


def test_a_claim_that_was_removed_is_a_lost_lease(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        for path in (tmp_path / ".lease").iterdir():
            path.unlink()
        time.sleep(0.5)
        with pytest.raises(lease.LeaseLost, match="is lost"):
            held.check()


def test_a_storage_that_is_away_for_too_long_is_a_lost_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OSError("no route")

    with hold(tmp_path) as held:
        monkeypatch.setattr(lease, "write_atomic", away)
        held.check()
        time.sleep(1.3)
        with pytest.raises(lease.LeaseLost, match=r"could not be renewed .* no route"):
            held.check()
        monkeypatch.undo()
        held.check()


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), hold(tmp_path / "file"):
        pass


def test_what_a_machine_knows_of_a_process() -> None:
    mine = lease.process_identity()
    assert lease.process_life(mine) == "alive"
    assert lease.process_life(mine | {"process_start": "1"}) == "dead"
    assert lease.process_life(mine | {"machine": "another"}) == "unknown"
    assert lease.process_life({}) == "unknown"
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    identity = mine | {"pid": ended.pid}
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert lease.process_life(identity) == "dead"  # a zombie
    ended.wait()
    assert lease.process_life(identity) == "dead"


def rival(out: str, barrier: Barrier, held: Any, most: Any, won: Any) -> None:
    for round_ in range(ROUNDS):
        barrier.wait()
        try:
            with lease.hold(locate(f"{out}/{round_}"), interval_s=0.5, expiry_s=5.0):
                with held.get_lock():
                    held.value += 1
                    won[round_] += 1
                    most.value = max(most.value, held.value)
                time.sleep(0.02)
                with held.get_lock():
                    held.value -= 1
        except UserError:
            pass


def test_of_runs_that_start_together_one_holds_at_a_time(tmp_path: Path) -> None:
    """A later one may hold when an earlier one has ended; never two at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(RIVALS)
    held, most, won = context.Value("i", 0), context.Value("i", 0), context.Array("i", ROUNDS)
    rivals = [
        context.Process(target=rival, args=(str(tmp_path), barrier, held, most, won))
        for _ in range(RIVALS)
    ]
    for process in rivals:
        process.start()
    for process in rivals:
        process.join(120)
    assert [process.exitcode for process in rivals] == [0] * RIVALS
    assert most.value == 1
    assert all(won[:])
