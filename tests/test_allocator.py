"""Memory that is used again and again is not fetched anew from the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio import allocator

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import resource, sys, threading
import numpy as np
from trio import allocator
assert allocator.keep_pages() == (sys.argv[1] == "kept")
def work(rounds):
    for _ in range(rounds):
        held = [np.ones(size << 20, np.uint8) for size in (70, 3, 40)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def measured():
    work(1)
    before, peak = faults(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(20)
    print(faults() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
thread = threading.Thread(target=measured)  # as a job's engine has one of its own
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library is Linux's")
def test_pages_are_kept_and_do_not_pile_up() -> None:
    found = {}
    for kind, asked in (("kept", {}), ("asked", {"MALLOC_MMAP_MAX_": "65536"})):
        plain = {n: v for n, v in os.environ.items() if n not in allocator.CHOICES}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind],
            env=plain | asked | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        found[kind] = list(map(int, done.stdout.split()))
    faults, grown_kb = found["kept"]
    assert faults < found["asked"][0] / 2  # pages of 2 MB are few in either way
    assert grown_kb < 150_000
