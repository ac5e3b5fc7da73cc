"""Nodes that go and nodes that come."""

import random
from collections.abc import Callable

import pytest

from tests.chaos.conftest import NODE_CPUS, NODES, Arena
from tests.chaos.harness import Trial, report, seeds

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
WHOLE_NODE = ("--cpus-per-actor", str(NODE_CPUS))


@pytest.mark.parametrize("seed", seeds(5))
def test_a_node_dies(arena: Arena, trial: Callable[..., Trial], seed: int) -> None:
    rng = random.Random(seed)
    job = trial(*WHOLE_NODE)
    driver = job.start()
    (moment,) = job.moments(rng, 1)
    job.until(lambda: len(job.engines()) > 0, driver)
    if job.wait_for(moment, driver):
        busy = {engine.node for engine in job.engines() if engine.alive} & set(arena.nodes)
        assert busy
        arena.kill(rng.choice(sorted(busy)))
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report("node", seed, job.check())
    assert job.drivers == 1


def test_a_node_joins_late(arena: Arena, trial: Callable[..., Trial]) -> None:
    job = trial(*WHOLE_NODE, "--actors", str(NODES + 1), "--wait-for-nodes", "120")
    job.with_options(delay_s=1.5)  # 30 s for three engines: a node takes ten to join and start one
    driver = job.start()
    job.wait_for(5, driver)
    late = arena.add()
    try:
        ended = job.end(driver)
        assert ended.code == 0, ended.said[-4000:]
        assert f"{NODES} of them fit now" in ended.said
        assert late in {engine.node for engine in job.engines()}
        report("late_node", 0, job.check())
    finally:
        arena.kill(late)


def test_all_nodes_die(arena: Arena, trial: Callable[..., Trial]) -> None:
    """For some seconds Ray goes on to place engines on nodes that are dead already."""
    job = trial(*WHOLE_NODE, "--wait-for-nodes", "120")
    driver = job.start()
    job.wait_for(10, driver)
    arena.empty()
    arena.refill()
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report("all_nodes", 0, job.check())
    assert job.drivers == 1


def test_no_node_but_the_head_until_later(arena: Arena, trial: Callable[..., Trial]) -> None:
    arena.empty()
    job = trial(*WHOLE_NODE, "--wait-for-nodes", "120", refill=False)
    driver = job.start()
    job.until(lambda: "0 of them fit now" in job.said(), driver)
    arena.refill()
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report("from_nothing", 0, job.check())


def test_more_than_there_is_is_refused_at_once(trial: Callable[..., Trial]) -> None:
    job = trial("--actors", "100")
    ended = job.run()
    assert ended.code == 2
    expected = f"chaos.py: 100 engines with 0 GPUs and 1 CPUs each: {NODES * NODE_CPUS} can be"
    assert expected in ended.said
    assert job.committed() == 0 and not job.engines()


def test_no_node_ever(arena: Arena, trial: Callable[..., Trial]) -> None:
    arena.empty()
    job = trial("--wait-for-nodes", "5", refill=False)
    ended = job.run()
    assert ended.code == 1
    assert "no room for an engine (1 CPUs and 0 GPUs)" in ended.said
    arena.refill()
    job.finish()
    job.check()
