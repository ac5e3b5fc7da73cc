"""Drivers, engines and passes killed at random moments: every row ends up written once."""

import random
from collections.abc import Callable

import pytest

from tests.chaos.harness import Trial, report, seeds

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "reversed"])
@pytest.mark.parametrize("seed", seeds())
def test_driver(trial: Callable[..., Trial], seed: int, reverse: bool) -> None:
    rng = random.Random(seed)
    job = trial().with_options(reverse=reverse)
    for moment in job.moments(rng, rng.choice([1, 1, 2])):
        driver = job.start()
        job.wait_for(moment, driver)
        driver.kill()
        driver.wait()
    job.finish()
    report(f"driver{'_reversed' * reverse}", seed, job.check())


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "reversed"])
@pytest.mark.parametrize("seed", seeds())
def test_engine(trial: Callable[..., Trial], seed: int, reverse: bool) -> None:
    rng = random.Random(seed)
    job = trial().with_options(reverse=reverse)
    driver = job.start()
    for moment in job.moments(rng, rng.choice([1, 1, 2])):
        if job.wait_for(moment, driver):
            job.kill_engine(rng, driver)
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report(f"engine{'_reversed' * reverse}", seed, job.check())
    assert job.drivers == 1 and "(raylet)" not in ended.said


@pytest.mark.parametrize("seed", seeds(5))
def test_pass(trial: Callable[..., Trial], seed: int) -> None:
    """The engines of a pass end with its actor; the next pass has others."""
    rng = random.Random(seed)
    job = trial()
    driver = job.start()
    struck = job.wait_for(job.moments(rng, 1)[0], driver) and job.kill_pass(driver)
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    assert ("the pass ended early" in ended.said) == struck
    report("pass", seed, job.check())
    assert job.drivers == 1


def test_finished_is_left_alone(trial: Callable[..., Trial]) -> None:
    job = trial()
    job.finish()
    cost = job.check()
    assert "nothing to do" in job.run().said
    assert job.check() == cost | {"drivers": 2}
    assert cost["answered_again"] == 0
