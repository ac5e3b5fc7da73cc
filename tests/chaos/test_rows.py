"""Rows that kill, hang or eat memory: each is one row's trouble, or nobody's."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import Arena, started, trials
from tests.chaos.engine import (
    BLOCKS,
    EAT_BYTES,
    EAT_ONCE,
    HANG_ONCE,
    KILLS,
    POISON,
    SLEEPS,
)
from tests.chaos.harness import Trial, report, seeds

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "reversed"])
@pytest.mark.parametrize("seed", seeds(3))
def test_poison(trial: Callable[..., Trial], seed: int, reverse: bool) -> None:
    rng = random.Random(seed)
    rows = rng.sample(range(240), 2)
    job = trial(**{f"r{row}": POISON for row in rows}).with_options(reverse=reverse)
    ended = job.run()
    assert ended.code == 0, ended.said[-4000:]
    cost = job.check(errors=dict.fromkeys(rows, "quarantined"))
    report(f"poison{'_reversed' * reverse}", seed, cost)


@pytest.mark.parametrize("seed", seeds(2))
def test_poison_and_a_killed_driver(trial: Callable[..., Trial], seed: int) -> None:
    rng = random.Random(seed)
    row = rng.randrange(240)
    job = trial(**{f"r{row}": POISON})
    driver = job.start()
    job.wait_for(job.moments(rng, 1)[0], driver)
    driver.kill()
    driver.wait()
    job.finish()
    report("poison_driver", seed, job.check(errors={row: "quarantined"}))


def test_poison_in_two_stages(trial: Callable[..., Trial]) -> None:
    """One row kills who prepares it, another who answers it, a third one's image never ends."""
    job = trial("--row-timeout", "2", r17=KILLS, r100=POISON, r203=SLEEPS)
    ended = job.run()
    assert ended.code == 0, ended.said[-4000:]
    errors = {17: "quarantined", 100: "quarantined", 203: "image_timeout"}
    report("poison_stages", 0, job.check(errors=errors))


def test_a_decoder_that_never_returns(trial: Callable[..., Trial]) -> None:
    """No alarm reaches it, so its process ends each time; thus it is a row that kills."""
    job = trial("--row-timeout", "2", r100=BLOCKS)
    ended = job.run()
    assert ended.code == 0, ended.said[-4000:]
    report("decoder_hang", 0, job.check(errors={100: "quarantined"}))


def test_a_step_that_never_ends(trial: Callable[..., Trial]) -> None:
    job = trial("--stall-timeout", "15", r100=HANG_ONCE)
    ended = job.run()
    assert ended.code == 0, ended.said[-4000:]
    assert "nothing moved in it for 15 s" in ended.said
    report("hang", 0, job.check())


@pytest.fixture(scope="module")
def narrow() -> Iterator[Arena]:
    """A cluster whose memory monitor ends workers when the machine has little more left."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[n].split()[0]) << 10 for n in ("MemTotal", "MemAvailable"))
    if free < 2 * EAT_BYTES:
        pytest.skip(f"needs {2 * EAT_BYTES >> 30} GB of free memory")
    threshold = (total - free + EAT_BYTES // 2) / total
    with started(
        RAY_memory_usage_threshold=f"{threshold:.4f}", RAY_memory_monitor_refresh_ms="100"
    ) as arena:
        yield arena


def test_out_of_memory(narrow: Arena, tmp_path: Path) -> None:
    job = trials(narrow, tmp_path)(r100=EAT_ONCE)
    ended = job.run()
    assert ended.code == 0, ended.said[-4000:]
    assert "an engine died" in ended.said
    report("memory", 0, job.check())
