"""Threads of a CPU wait without spinning, unless the user says otherwise."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny.llava import tiny_llava, tiny_processor
from trio import openmp as waiting
from trio.engine.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
ASKED = [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "5"}]


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in waiting.CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "_warned", False)
    monkeypatch.setattr(waiting, "_late", False)
    monkeypatch.setattr(waiting, "_set_here", False)


@pytest.mark.parametrize("asked", ASKED)
def test_what_the_user_says_stands(asked: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    waiting.passively()
    assert waiting.chosen() == asked
    assert waiting.describe() == "=".join(*asked.items())
    assert waiting.environment_as_found() == dict(os.environ)


def test_programs_of_others_do_not_get_what_nobody_asked_for() -> None:
    before = dict(os.environ)
    waiting.passively()
    assert os.environ[waiting.POLICY] == waiting.PASSIVE
    assert waiting.environment_as_found() == before


@pytest.mark.parametrize(
    ("command", "asked", "policy", "spins"),
    [
        (["jobs/benchmark.py", "targets", "--dry-run"], {}, "PASSIVE", "0"),
        pytest.param(
            *(["-m", "tests.conformance", "--help"], {}, "PASSIVE", "0"), marks=pytest.mark.slow
        ),
        pytest.param(
            *(["-m", "tests.conformance", "--help"], ASKED[1], "PASSIVE", "1000"),
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says what it goes by")
def test_programs_say_it_before_openmp_is_loaded(
    command: list[str], asked: dict[str, str], policy: str, spins: str
) -> None:
    """What libgomp itself has read, in a process that loads torch."""
    environment = os.environ | asked | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read = dict(line.split(" = ") for line in done.stderr.splitlines() if " = " in line)
    found = {name.split()[-1]: value.strip("'") for name, value in read.items()}
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == (policy, spins)


@pytest.mark.parametrize("late", [False, True])
def test_an_engine_says_once_that_its_threads_spin(
    late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the setting came when torch was there already: it then holds for children."""
    monkeypatch.setenv(waiting.POLICY, "")
    if late:
        waiting.passively()
        assert os.environ[waiting.POLICY] == waiting.PASSIVE
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with caplog.at_level(logging.WARNING, waiting.__name__):
        for _ in range(2):
            Engine(tiny_llava(), tiny_processor())
    (record,) = caplog.records
    assert "2 threads" in record.getMessage() and "OMP_WAIT_POLICY=PASSIVE" in record.getMessage()
    assert waiting.describe() == "spinning"


@pytest.mark.parametrize(
    ("threads", "asked"),
    [(1, {}), *((2, asked) for asked in ASKED), (2, {"OMP_WAIT_POLICY": "PASSIVE"})],
)
def test_an_engine_is_silent_where_nothing_spins_or_somebody_wants_it(
    threads: int,
    asked: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    Engine(tiny_llava(), tiny_processor())
    assert not caplog.records
