"""Runs that reach for the same output at the same moment, or lose it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trio.errors import UserError
from trio.job.resume import lease
from trio.job.storage import Location

RIVALS = 3


def start_together(at: Callable[[int], Location], *, rounds: int) -> None:
    """Each round on an output of its own: one holds at a time, the others are told that it is in
    use. A later one may hold when an earlier one has ended."""
    barrier, alone = threading.Barrier(RIVALS, timeout=60), threading.Lock()

    def rival(round_: int) -> str | None:
        barrier.wait()
        try:
            with lease.hold(at(round_)):
                assert alone.acquire(blocking=False), "two hold it"
                time.sleep(0.02)
                alone.release()
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(RIVALS) as pool:
        for round_ in range(rounds):
            said = list(pool.map(rival, [round_] * RIVALS))
            assert None in said
            assert all(line is None or "is in use by process" in line for line in said)


def check_until_lost(held: lease.Held) -> None:
    """As a run does that goes on; its thread notices after an interval."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        held.check()
        time.sleep(0.02)
