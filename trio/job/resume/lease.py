"""One run at a time on an output: a lease that survives a crash and needs no server.

Two small files below ``OUT/.lease`` stand for a run: its claim, written once, and its beat, written
anew every few seconds. A run that has written its claim lists the directory, and holds the lease
when no other claim is there. Of two runs whose claims overlap in time, the one that finished
writing last sees the other, whatever the clocks say: so at most one holds. Order of age, by the
storage's own times, decides only who gives way: the younger is refused, the elder waits for it to
go. Arrow offers no write that fails where a file is, and on object stores none is needed so.

A claim is dead when its process is gone from this machine, or, if it is one of another machine,
when it has not beaten for ``expiry_s`` by the storage's clock. A dead claim is removed by whoever
comes next, and a run whose claim is gone has lost the lease.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from trio.errors import JobFailed, UserError
from trio.job.storage import Location, exists, read_bytes, write_atomic

DIRECTORY = ".lease"
CLAIM, BEAT = ".claim", ".beat"
INTERVAL_S, EXPIRY_S = 10.0, 60.0
SHORTEST_POLL_S = 0.05
PATIENCE = 3
# intervals for which an elder claim waits for a younger one to give way


class LeaseLost(JobFailed):
    """Another run may be writing to the output: this one must stop."""


@contextmanager
def hold(
    output: Location,
    *,
    interval_s: float = INTERVAL_S,
    expiry_s: float = EXPIRY_S,
    say: Callable[[str], object] = print,
) -> Iterator[Held]:
    """Hold the lease on an output while the block runs.

    Args:
        output: the run's directory, which is made if need be.
        interval_s: seconds between two beats.
        expiry_s: seconds without a beat after which a claim of another machine is dead.
        say: told in a line when there is something to wait for.

    Raises:
        UserError: another run holds it, or the output cannot be written.
    """
    held = Held(output, interval_s=interval_s, expiry_s=expiry_s)
    try:
        try:
            held.claim(say)
        except OSError as error:
            raise UserError(f"--output {output.uri}: cannot be written: {error}") from error
        yield held
    finally:
        held.release()


@dataclass(frozen=True, slots=True)
class _Seen:
    """A claim as the listing shows it; times are the storage's [ns]."""

    written: int
    beaten: int
    # the claim's own time where it has not beaten yet


@dataclass(frozen=True, slots=True)
class _First:
    """A claim when we first saw it."""

    owner: Mapping[str, Any]
    beaten: int
    # by the storage's clock [ns]
    at: float
    # by ours [s]


class Held:
    """A run's claim, beating in a thread of its own from `claim` to `release`."""

    def __init__(self, output: Location, *, interval_s: float, expiry_s: float) -> None:
        self._output = output
        self._interval_s, self._expiry_s = interval_s, expiry_s
        self._name = uuid.uuid4().hex
        self._first: dict[str, _First] = {}
        self._said = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="trio-lease", daemon=True)
        self._confirmed = now()
        # when the latest beat that was found to count began
        self._lost: str | None = None

    def check(self) -> None:
        """Make sure that the lease is still ours; cheap, as most calls look at no file.

        Raises:
            LeaseLost: it is not, or that could not be told for longer than others wait for us.
        """
        if self._lost is None and now() - self._confirmed > self._expiry_s / 2:
            # The thread is late: the process may have been stopped, or the storage be away.
            try:
                self._beat()
            except OSError as error:
                if now() - self._confirmed > self._expiry_s:
                    raise LeaseLost(
                        f"the lease on {self._output.uri} could not be renewed for"
                        f" {now() - self._confirmed:.0f} s: {error}"
                    ) from error
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def claim(self, say: Callable[[str], object]) -> None:
        """Write the claim and wait until it is the only one.

        Raises:
            UserError: another run is alive.
            LeaseLost: somebody removed the claim meanwhile.
            OSError: the storage does not answer.
        """
        _write(self._file(self._name, CLAIM), json.dumps(process_identity(), indent=1).encode())
        self._beat()
        self._thread.start()
        poll_s = SHORTEST_POLL_S
        while True:
            others = self._look()
            mine = others.pop(self._name, None)
            if mine is None:
                raise LeaseLost(self._gone())
            if not others:
                return
            for name, seen in others.items():
                self._settle(name, seen, mine, say)
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, self._interval_s / 5)
            self._beat()  # its time is how we read the storage's clock

    def release(self) -> None:
        """Stop beating and take the claim away; what cannot be removed expires by itself."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._expiry_s)
        self._remove(self._name, CLAIM, BEAT)
        if self._output.local:
            # Only if empty. On an object store the same would take new claims along.
            with contextlib.suppress(OSError):
                Path(self._output.join(DIRECTORY).path).rmdir()

    def _settle(self, name: str, seen: _Seen, mine: _Seen, say: Callable[[str], object]) -> None:
        """Remove another claim if it is dead; refuse ours if its run is alive and goes first."""
        if name not in self._first:
            self._first[name] = _First(self._owner(name), seen.beaten, now())
        first = self._first[name]
        alive = process_life(first.owner)
        silent_s = (mine.beaten - seen.beaten) / 1e9
        younger = (seen.written, name) > (mine.written, self._name)
        if alive is False or (alive is None and silent_s >= self._expiry_s):
            self._bury(name, seen, first.owner)
        elif alive or seen.beaten != first.beaten:
            if not younger or now() - first.at > PATIENCE * self._interval_s:
                raise self._refusal(first.owner)
        elif not self._said:
            self._said = True
            say(
                f"--output {self._output.uri} was claimed by {_who(first.owner)}, whose last sign"
                f" of life is {max(0.0, silent_s):.0f} s old; waiting for up to"
                f" {self._expiry_s - max(0.0, silent_s):.0f} s to see whether it is still running"
            )

    def _bury(self, name: str, seen: _Seen, owner: Mapping[str, Any]) -> None:
        """Remove a dead claim.

        Its run might wake up at this very moment. It writes its beat before it looks for its
        claim, we remove the claim before we look for a beat: so one of the two sees the other.
        """
        self._remove(name, CLAIM)
        beat = self._output.filesystem.get_file_info(self._file(name, BEAT).path)
        if beat.is_file and (beat.mtime_ns or 0) > seen.beaten:
            raise self._refusal(owner)
        self._remove(name, BEAT)

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        return UserError(
            f"--output {self._output.uri} is in use by {_who(owner)}; wait for that run, stop it,"
            f" or give another --output (if it is surely gone, remove {DIRECTORY} there)"
        )

    def _gone(self) -> str:
        return (
            f"the lease on {self._output.uri} is lost: another run took it over, or {DIRECTORY} was"
            " removed there; this run stops, so that no row is written twice"
        )

    def _look(self) -> dict[str, _Seen]:
        """Claims by name, ours among them."""
        selector = pafs.FileSelector(self._output.join(DIRECTORY).path, allow_not_found=True)
        infos = self._output.filesystem.get_file_info(selector)
        times = {i.base_name: int(i.mtime_ns or 0) for i in infos if i.is_file}
        claims = {f.removesuffix(CLAIM): at for f, at in times.items() if f.endswith(CLAIM)}
        return {name: _Seen(at, times.get(name + BEAT, at)) for name, at in claims.items()}

    def _owner(self, name: str) -> Mapping[str, Any]:
        """What a claim says of its run; nothing when it is gone or damaged."""
        try:
            owner = json.loads(read_bytes(self._file(name, CLAIM)))
        except (FileNotFoundError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _beat(self) -> None:
        """Show that we live, then see whether that still counts."""
        with self._lock:
            began = now()
            _write(self._file(self._name, BEAT), b"")
            if exists(self._file(self._name, CLAIM)):
                self._confirmed = began
            else:
                self._lost = self._gone()
                self._remove(self._name, BEAT)

    def _beat_on(self) -> None:
        while self._lost is None and not self._stop.wait(self._interval_s):
            with contextlib.suppress(OSError):
                self._beat()

    def _file(self, name: str, ending: str) -> Location:
        return self._output.join(DIRECTORY, name + ending)

    def _remove(self, name: str, *endings: str) -> None:
        for ending in endings:
            with contextlib.suppress(OSError):
                self._output.filesystem.delete_file(self._file(name, ending).path)


def _write(location: Location, data: bytes) -> None:
    """Again where a run that ends has just removed the directory."""
    for attempt in range(10):
        try:
            return write_atomic(location, data)
        except FileNotFoundError:
            if attempt == 9:
                raise


def _who(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "a run that does not say which"
    return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started_at')}"


def now() -> float:
    """Seconds that also count while the process, or the whole machine, was stopped."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def process_identity() -> dict[str, Any]:
    """This process, told apart from every other one of this machine, earlier ones included."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started_at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "machine": _machine(),
        "process_start": _machine() and _process_start(os.getpid()),
    }


def process_life(owner: Mapping[str, Any]) -> bool | None:
    """Whether a claim's process lives; None where this machine cannot tell.

    A process id means something only within one boot and one pid namespace; its start time only
    within one time namespace.
    """
    pid, start, here = owner.get("pid"), owner.get("process_start"), _machine()
    if (
        not isinstance(pid, int)
        or pid <= 0
        or not start
        or not here
        or owner.get("machine") != here
    ):
        return None
    try:
        os.kill(pid, 0)
        return _process_start(pid) == start
    except (ProcessLookupError, FileNotFoundError):
        return False
    except OSError:  # another user's
        return None


def _machine() -> str | None:
    """Host, boot and namespaces of this process; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "time")]
    except OSError:
        return None
    return " ".join([socket.gethostname(), boot, *spaces])


def _process_start(pid: int) -> str:
    """Start of a process in ticks since boot; "" of one that only waits for its parent."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
