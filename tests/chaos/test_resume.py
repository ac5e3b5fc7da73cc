"""What it costs to go on: nothing is read of shards that are done."""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.chaos.harness import Trial, report, seeds, write_input
from tests.job.store import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
SHARDS, ROWS, UNITS = 20, 12, 3


@pytest.mark.parametrize("seed", seeds(3))
def test_nine_tenths_done(store: Store, trial: Callable[..., Trial], seed: int) -> None:
    """Input and output are on an object store, which counts the bytes that it is asked for."""
    job = trial(output=store.uri("out"))
    job.expected = write_input(job.folder / "many", {}, shards=SHARDS, rows=ROWS)
    for path in (job.folder / "many").iterdir():
        store.put(f"in/{path.name}", path.read_bytes())
    job.source = store.uri("in")
    driver = job.start()
    assert job.wait_for(int(0.9 * SHARDS * UNITS), driver)
    driver.kill()
    driver.wait()
    store.requests()
    # Shards are numbered in the order of their names.
    names = sorted(f"{number}.parquet" for number in range(SHARDS))
    units = Counter(unit.shard for unit in job.units())
    finished = [names[shard] for shard, count in units.items() if count == UNITS]
    assert len(finished) >= 0.8 * SHARDS
    began, before = time.monotonic(), job.answers().total()
    driver = job.start()
    assert job.until(lambda: job.answers().total() > before, driver)
    first_s = time.monotonic() - began
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    read: Counter[str] = Counter()
    for request in store.requests():
        folder, _, name = request.path.partition("?")[0].rpartition("/")
        if request.method == "GET" and folder.endswith("/in"):
            read[name] += request.bytes
    assert {name: read[name] for name in finished} == dict.fromkeys(finished, 0)
    assert read.total() > 0
    cost = {"finished_shards": len(finished), "first_answer_s": round(first_s, 1)}
    report("resume", seed, job.check() | cost)
