"""One run at a time: real processes that start together, are killed, stopped and continued."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.job.rivals import check_until_lost, start_together
from trio.errors import UserError
from trio.job.resume import lease
from trio.job.storage import Location, locate, write_atomic

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from trio.job.resume import lease
from trio.job.storage import locate
with lease.hold(locate(sys.argv[1]), interval_s=0.1, expiry_s=0.5) as held:
    print("holds", flush=True)
    while True:
        time.sleep(0.02)
        try:
            held.check()
        except lease.LeaseLost as error:
            print("lost", error, flush=True)
            break
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until it loses it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def hold(out: Path, say: Callable[[str], object] = print) -> Any:
    return lease.hold(locate(str(out)), interval_s=0.1, expiry_s=0.5, say=say)


def claims(out: Path) -> list[Path]:
    return sorted((out / ".lease").glob("*.claim"))


def written(out: Path, who: str = "process 1 on far, started 2026") -> Path:
    """A claim whose process this machine cannot look at."""
    claim = out / ".lease" / "other.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text(who)
    return claim


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A claim of another machine, silent from now on."""
    return written(tmp_path)


def test_it_is_held_while_the_block_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as held:
        (claim,) = claims(tmp_path / "out")
        assert re.fullmatch(rf"process {os.getpid()} on .+, started 20.+ UTC", claim.read_text())
        assert lease.lives(claim.stem)
        before, beat = claim.stat().st_mtime_ns, claim.with_suffix(".beat")
        first, until = beat.stat().st_mtime_ns, time.monotonic() + 30
        while beat.stat().st_mtime_ns == first:
            assert time.monotonic() < until
            time.sleep(0.02)
        held.check()
        assert claim.stat().st_mtime_ns == before
    assert os.listdir(tmp_path / "out") == [".lease"] and not claims(tmp_path / "out")
    assert lease.lives(claim.stem) is None


def test_a_second_run_is_refused_and_told_who_is_there(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    said: list[str] = []
    who = rf"in use by process {holder.pid} on .* started 20"
    for signal_ in (signal.SIGCONT, signal.SIGSTOP):  # also one that is there and does not move
        holder.send_signal(signal_)
        with pytest.raises(UserError, match=who), hold(tmp_path, said.append):
            pass
    assert said == [] and len(claims(tmp_path)) == 1  # nothing to wait for


def test_a_killed_run_is_taken_over_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (claim,) = claims(tmp_path)
    holder.kill()
    holder.wait()
    said: list[str] = []
    with lease.hold(locate(str(tmp_path)), say=said.append) as held:
        held.check()
        assert len(claims(tmp_path)) == 1
    assert said == []
    assert not lease.mark(claim.stem).exists()


def test_a_stopped_run_elsewhere_that_goes_on_later_has_lost_the_lease(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    (claim,) = claims(tmp_path)
    lease.mark(claim.stem).unlink()
    with hold(tmp_path) as held:
        holder.send_signal(signal.SIGCONT)
        assert holder.stdout is not None and "lost the lease" in holder.stdout.readline()
        assert holder.wait(timeout=60) == 0
        held.check()
        assert len(claims(tmp_path)) == len(list((tmp_path / ".lease").glob("*.beat"))) == 1


def test_a_silent_run_elsewhere_is_waited_for(tmp_path: Path, foreign: Path) -> None:
    began = foreign.stat().st_mtime
    said: list[str] = []
    with hold(tmp_path, said.append):
        assert time.time() - began > 0.5
    assert len(said) <= 1
    assert all("on far" in line and "waiting for up to" in line for line in said)


def test_a_run_elsewhere_that_is_long_dead_is_not_waited_for(tmp_path: Path, foreign: Path) -> None:
    os.utime(foreign, (time.time() - 100, time.time() - 100))
    said: list[str] = []
    with lease.hold(locate(str(tmp_path)), say=said.append):
        assert said == []


def test_a_run_elsewhere_that_beats_is_left_alone(tmp_path: Path, foreign: Path) -> None:
    def beat(line: str) -> None:
        said.append(line)
        foreign.with_suffix(".beat").write_text("")

    said: list[str] = []
    waiting = lease.hold(locate(str(tmp_path)), interval_s=0.1, say=beat)
    with pytest.raises(UserError, match=r"in use by process \d+ on far"), waiting:
        pass
    assert len(said) == 1 and "process" in said[0] and "waiting for up to 60 s" in said[0]
    assert claims(tmp_path) == [foreign]


@pytest.fixture
def younger(tmp_path: Path) -> Iterator[Path]:
    """As when both wrote their claims at the same time, and ours is a moment older."""
    claim = written(tmp_path, "process 2 here")
    os.utime(claim, (time.time() + 50, time.time() + 50))
    with lease.living("other"):
        yield claim


def test_a_younger_claim_is_waited_for_and_does_not_win(tmp_path: Path, younger: Path) -> None:
    timer = threading.Timer(0.3, younger.unlink)
    timer.start()
    with lease.hold(locate(str(tmp_path))):
        assert not younger.exists()
    timer.join()


def test_one_that_does_not_give_way_is_not_waited_for_without_end(
    tmp_path: Path, younger: Path
) -> None:
    with pytest.raises(UserError, match="in use by process 2"), hold(tmp_path):
        pass
    assert claims(tmp_path) == [younger]


def test_a_claim_that_was_removed_is_a_lost_lease(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        for path in claims(tmp_path):
            path.unlink()
        with pytest.raises(lease.LeaseLost, match="is lost"):
            check_until_lost(held)


def test_a_storage_that_is_away_for_too_long_is_a_lost_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OSError("no route")

    clock = [0.0]
    monkeypatch.setattr(lease, "now", lambda: clock[0])
    with lease.hold(locate(str(tmp_path))) as held, monkeypatch.context() as gone:
        gone.setattr(lease, "write_atomic", away)
        for clock[0] in (0.0, 40.0, 60.0):
            held.check()
        clock[0] = 61.0
        with pytest.raises(lease.LeaseLost, match=r"not be renewed for 61 s: no route"):
            held.check()


def test_a_claim_whose_beat_cannot_be_written_is_given_up(
    tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Location, data: bytes) -> None:
        if place.path.endswith(lease.BEAT):
            raise OSError("no space left")
        write_atomic(place, data)

    monkeypatch.setattr(lease, "write_atomic", full)
    with pytest.raises(UserError, match="cannot be written: no space left"), hold(tmp_path):
        pass


def test_no_room_for_the_sign_of_life_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "mark", lambda name: tmp_path / "nowhere" / name)
    refused = pytest.raises(UserError, match="in use by process")
    with hold(tmp_path / "out"), refused, hold(tmp_path / "out"):
        pass


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), hold(tmp_path / "file"):
        pass


def test_of_runs_that_start_together_one_holds_at_a_time(tmp_path: Path) -> None:
    start_together(lambda round_: locate(f"{tmp_path}/{round_}"), rounds=20)
