"""Busy loops, one process each, as load beside a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 3600.0
# after which such a process ends whatever has become of the measurement
_END_S = 10.0
_LOOP = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while os.getppid() == parent and time.monotonic() < end:
    sum(range(20_000))
"""


@contextmanager
def neighbours(count: int, limit_s: float = LIMIT_S) -> Iterator[None]:
    """So many busy loops run while the block does, and end with it or with this process.

    Args:
        count: processes.
        limit_s: that they last at most, in seconds.

    Raises:
        RuntimeError: one of them did not last as long as the block, which was measured without it.
    """
    command = [sys.executable, "-S", "-P", "-c", _LOOP, str(os.getpid()), str(limit_s)]
    loops = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
        ended = sum(loop.poll() is not None for loop in loops)
        if ended:
            raise RuntimeError(
                f"{ended} of {count} busy loops ended before the measurement that they disturb"
            )
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait(_END_S)
