"""Jobs that are told to stop, cannot start, meet another on their output, or write to a store."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.conftest import Arena
from tests.chaos.harness import Trial, report, seeds
from tests.job.store import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.mark.parametrize("seed", seeds(5))
def test_told_to_stop(trial: Callable[..., Trial], seed: int) -> None:
    rng = random.Random(seed)
    job = trial()
    driver = job.start()
    moment = max(1, job.moments(rng, 1)[0])
    if job.wait_for(moment, driver):
        driver.send_signal(signal.SIGTERM)
    ended = job.end(driver, timeout=60)
    if ended.code != 0:
        assert ended.code == 1 and "the same command with the same --output goes on" in ended.said
    before, answered = job.committed(), sum(job.answers().values())
    job.finish()
    cost = job.check()
    report("sigterm", seed, cost)
    # What was in hand was waited for: nothing that had been answered is asked again.
    assert before >= moment and answered == 5 * before and cost["answered_again"] == 0


@pytest.mark.parametrize("how", ["raise", "exit"])
def test_engines_that_cannot_start(trial: Callable[..., Trial], how: str) -> None:
    job = trial().with_options(start=how)
    ended = job.run()
    assert ended.code == 1 and len(job.engines()) <= 12
    reason = "no weights on this node" if how == "raise" else "died"
    assert "engines failed to start" in ended.said and reason in ended.said
    assert "Traceback" not in ended.said
    job.with_options(start="").finish()
    job.check()


def test_an_engine_that_the_user_can_mend(trial: Callable[..., Trial]) -> None:
    ended = trial().with_options(start="user").run()
    assert (ended.code, ended.said.splitlines()[-1]) == (
        2,
        "chaos.py: --model demo: not for this test",
    )


def test_two_at_a_time(trial: Callable[..., Trial]) -> None:
    job = trial()
    first = job.start()
    job.wait_for(2, first)
    second = job.run()
    assert second.code == 2 and "another" in second.said, second.said
    job.drivers = 1
    ended = job.end(first)
    assert ended.code == 0, ended.said[-4000:]
    assert job.check()["answered_again"] == 0


@pytest.mark.parametrize("victim", ["driver", "engine"])
@pytest.mark.parametrize("seed", seeds())
def test_on_an_object_store(
    arena: Arena, store: Store, trial: Callable[..., Trial], seed: int, victim: str
) -> None:
    rng = random.Random(seed)
    job = trial(output=store.uri(f"{victim}-{seed}")).with_options(reverse=bool(seed % 2))
    driver = job.start()
    reached = job.wait_for(job.moments(rng, 1)[0], driver)
    if victim == "driver":
        driver.kill()
        driver.wait()
        job.finish()
    else:
        if reached:
            job.kill_engine(rng, driver)
        ended = job.end(driver)
        assert ended.code == 0, ended.said[-4000:]
    report(f"store_{victim}", seed, job.check())


def test_the_store_keeps_what_a_local_run_gives(
    store: Store, trial: Callable[..., Trial], tmp_path: Path
) -> None:
    job = trial(output=store.uri("whole"))
    job.finish()
    assert job.check()["answered_again"] == 0
    assert "nothing to do" in job.run().said
