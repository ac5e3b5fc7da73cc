"""Busy loops beside a measurement: there as long as it lasts, and never longer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trio.benchmark.speed.neighbours import neighbours

ROOT = Path(__file__).resolve().parents[2]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_busy_loops_end_with_the_measurement(how: str) -> None:
    code = (
        "import os, signal, subprocess\n"
        "started, begin = [], subprocess.Popen\n"
        "def note(*a): started.append(begin(*a)); return started[-1]\n"
        "subprocess.Popen = note\n"
        "from trio.benchmark.speed.neighbours import neighbours\n"
        "with neighbours(2):\n"
        "    print(*(each.pid for each in started), flush=True)\n"
        f"    if {how == 'dies'}: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loops = [int(word) for word in done.stdout.split()]
    assert len(loops) == 2 and done.returncode == (-9 if how == "dies" else 0), done.stderr
    deadline = time.monotonic() + 30
    while any(map(alive, loops)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, loops))


def test_a_busy_loop_that_ended_early_spoils_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="1 of 1 busy loops ended"), neighbours(1, limit_s=0.0):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
