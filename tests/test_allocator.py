"""Memory that is used again and again is not fetched anew from the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio import allocator
from trio.allocator import ONE_ARENA

ROOT = Path(__file__).resolve().parents[1]
FAULTS = """
import resource, threading
import torch
from trio import allocator
assert allocator.keep_pages()
def work(rounds):
    for _ in range(rounds):
        held = [torch.ones(size << 18) for size in (170, 3, 90)]
        del held
def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
def measured():
    work(2)
    before, peak = faults(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(4)
    print(faults() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
torch.set_num_threads(1)
hold = threading.Event()
for _ in range(4):  # threads that have memory already, as Ray's
    threading.Thread(target=hold.wait, daemon=True).start()
thread = threading.Thread(target=measured)  # as a job's engine has one of its own
thread.start()
thread.join()
"""


def measured(program: str = FAULTS, **asked: str) -> list[int]:
    """The whole numbers that a program prints."""
    plain = {n: v for n, v in os.environ.items() if n not in {*allocator.CHOICES, *ONE_ARENA}}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=plain | asked | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return list(map(int, done.stdout.split()))


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library is Linux's")
def test_pages_are_kept_and_do_not_pile_up() -> None:
    """Page faults, and what the largest size of the process has grown by."""
    faults, grown_kb = measured(**ONE_ARENA)
    assert faults < measured()[0] / 2  # pages of 2 MB are few in either way
    assert grown_kb < 540_000  # twice what is held at a time, of four times


def test_a_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    assert not allocator.keep_pages()


ENGINE = """
import torch
from tests.tiny.llava import tiny_llava, tiny_processor
from trio.engine.engine import Engine
def resident():  # in MB
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6
with Engine(tiny_llava(), tiny_processor()):
    before = resident()
    held = [torch.ones(50 << 18) for _ in range(8)]  # 419 MB
    del held
    print(round(resident() - before))
print(round(resident() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library is Linux's")
def test_an_engine_keeps_pages_until_it_is_closed() -> None:
    kept, left = measured(ENGINE)
    assert kept > 400 and left < 100
