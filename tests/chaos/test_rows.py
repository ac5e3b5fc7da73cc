"""Rows that kill, hang or eat memory: each is one row's trouble, or nobody's."""

import os
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
from tests.chaos.harness import SCHEMA, Trial, report, seeds
from tests.job.fakes import png, write_shard
from tests.job.store import Store

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


def test_poison_in_each_stage(store: Store, trial: Callable[..., Trial]) -> None:
    """One row kills who reads its image, one who prepares it, one who answers it; the image of a
    fourth takes too long."""
    job = trial("--row-timeout", "2", r17=KILLS, r100=POISON, r203=SLEEPS)
    # A shard of one row: who reads on in a row group passes over the rows before.
    deadly = job.folder / "in" / "4.parquet"
    entry = {"id": 240, "image": png((0, 4, 0)) + os.urandom(400_000), "prompt": "row 240"}
    write_shard(deadly, [entry], SCHEMA)
    for path in deadly.parent.iterdir():
        store.put(f"in/{path.name}", path.read_bytes())
    job.source = store.uri("in")
    job.expected = [*job.expected, "row 240 [(0, 4, 0)]"]
    store.kill("in/4.parquet 200000")  # in the middle of the image
    try:
        ended = job.run()
    finally:
        store.kill()
    assert ended.code == 0, ended.said[-4000:]
    errors = dict.fromkeys((17, 100, 240), "quarantined") | {203: "image_timeout"}
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
    # No process tells of its own end then, and Ray need not place another in the same pass.
    assert "an engine died" in ended.said or "lost with a process" in ended.said
    report("memory", 0, job.check())
