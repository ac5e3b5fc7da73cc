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

import datetime
import fcntl
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
    with living(held.name):
        try:
            try:
                held.claim(say)
            except OSError as error:
                raise UserError(f"--output {output.uri}: cannot be written: {error}") from error
            yield held
        finally:
            held.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim as the listing shows it."""

    name: str
    written: int
    """When, by the storage's clock [ns]."""
    beaten: int
    """When last; the claim's own time where it has not beaten yet."""


class Held:
    """A run's claim, beating in a thread of its own from `claim` to `release`."""

    def __init__(self, output: Location, *, interval_s: float, expiry_s: float) -> None:
        self.name = uuid.uuid4().hex
        self._output = output
        self._interval_s, self._expiry_s = interval_s, expiry_s
        self._first: dict[str, tuple[int, float]] = {}
        # beat of another claim when it was first seen, and when that was by our clock [s]
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
            self._try_beat()
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def claim(self, say: Callable[[str], object]) -> None:
        """Write the claim and wait until it is the only one.

        Raises:
            UserError: another run is alive.
            LeaseLost: somebody removed the claim meanwhile.
            OSError: the storage does not answer.
        """
        started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        who = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        write_atomic(self._file(self.name, CLAIM), who.encode())
        self._beat()
        self._thread.start()
        poll_s = SHORTEST_POLL_S
        while True:
            claims = self._look()
            mine = claims.pop(self.name, None)
            if mine is None:
                raise LeaseLost(self._gone())
            if not claims:
                return
            for other in claims.values():
                self._settle(other, mine, say)
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, self._interval_s / 5)
            self._beat()  # its time is how we read the storage's clock

    def release(self) -> None:
        """Stop beating and take the claim away; what cannot be removed expires by itself."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._expiry_s)
        self._remove(self.name, CLAIM, BEAT)

    def _settle(self, other: Claim, mine: Claim, say: Callable[[str], object]) -> None:
        """Remove another claim if it is dead; refuse ours if its run is alive and goes first."""
        alive = lives(other.name)
        try:
            who = read_bytes(self._file(other.name, CLAIM)).decode(errors="replace")
        except FileNotFoundError:  # its run has ended since
            return
        first_beat, seen_at = self._first.setdefault(other.name, (other.beaten, now()))
        if alive is None and other.beaten != first_beat:
            alive = True
        silent_s = max(0.0, (mine.beaten - other.beaten) / 1e9)
        younger = (other.written, other.name) > (mine.written, mine.name)
        if alive is False or (alive is None and silent_s >= self._expiry_s):
            self._bury(other, who)
        elif alive:
            if not younger or now() - seen_at > PATIENCE * self._interval_s:
                raise self._refusal(who)
        elif not self._said:
            self._said = True
            say(
                f"--output {self._output.uri} was claimed by {who}, whose last sign"
                f" of life is {silent_s:.0f} s old; waiting for up to"
                f" {self._expiry_s - silent_s:.0f} s to see whether it is still running"
            )

    def _bury(self, dead: Claim, who: str) -> None:
        """Remove a dead claim.

        Its run might wake up at this very moment. It writes its beat before it looks for its
        claim, we remove the claim before we look for a beat: so one of the two sees the other.
        """
        self._remove(dead.name, CLAIM)
        beat = self._output.filesystem.get_file_info(self._file(dead.name, BEAT).path)
        if beat.is_file and (beat.mtime_ns or 0) > dead.beaten:
            raise self._refusal(who)
        self._remove(dead.name, BEAT)
        with suppress(OSError):
            mark(dead.name).unlink()

    def _refusal(self, who: str) -> UserError:
        return UserError(
            f"--output {self._output.uri} is in use by {who}; wait for that run, stop it,"
            f" or give another --output (if it is surely gone, remove {DIRECTORY} there)"
        )

    def _gone(self) -> str:
        return (
            f"the lease on {self._output.uri} is lost: another run took it over, or {DIRECTORY} was"
            " removed there; this run stops, so that no row is written twice"
        )

    def _look(self) -> dict[str, Claim]:
        """Claims by name, ours among them."""
        selector = pafs.FileSelector(self._output.join(DIRECTORY).path, allow_not_found=True)
        infos = self._output.filesystem.get_file_info(selector)
        times = {i.base_name: int(i.mtime_ns or 0) for i in infos if i.is_file}
        claims = {f.removesuffix(CLAIM): at for f, at in times.items() if f.endswith(CLAIM)}
        return {
            name: Claim(name=name, written=at, beaten=times.get(name + BEAT, at))
            for name, at in claims.items()
        }

    def _beat(self) -> None:
        """Show that we live, then see whether that still counts.

        Raises:
            OSError: the storage does not answer.
        """
        with self._lock:
            began = now()
            write_atomic(self._file(self.name, BEAT), b"")
            if exists(self._file(self.name, CLAIM)):
                self._confirmed = began
            else:
                self._lost = self._gone()
                self._remove(self.name, BEAT)

    def _try_beat(self) -> None:
        """The same, where a storage that is away for a while is borne."""
        try:
            self._beat()
        except OSError as error:
            silent_s = now() - self._confirmed
            if silent_s > self._expiry_s:
                self._lost = (
                    f"the lease on {self._output.uri} could not be renewed for"
                    f" {silent_s:.0f} s: {error}"
                )

    def _beat_on(self) -> None:
        while self._lost is None and not self._stop.wait(self._interval_s):
            self._try_beat()

    def _file(self, name: str, ending: str) -> Location:
        return self._output.join(DIRECTORY, name + ending)

    def _remove(self, name: str, *endings: str) -> None:
        for ending in endings:
            with suppress(OSError):
                self._output.filesystem.delete_file(self._file(name, ending).path)


def now() -> float:
    """Seconds that also count while the process, or the whole machine, was stopped."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def living(name: str) -> Iterator[None]:
    """Shows other processes of this machine that the one with this claim lives, while the block
    runs: the kernel takes its lock away when it ends, however it ends."""
    path, file = mark(name), None
    try:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # no room, or no locks: others go by the beats
        with suppress(OSError):
            path.unlink()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        if file is not None:
            file.close()


def lives(name: str) -> bool | None:
    """Whether the process with this claim lives; None where this machine cannot tell."""
    try:
        with mark(name).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def mark(name: str) -> Path:
    """The file that the process with a claim keeps locked.

    Its name tells the kernel, too: machines may share a directory, and yet not its locks.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = socket.gethostname()
    return Path(tempfile.gettempdir(), f"trio-lease-{kernel}-{name}")
