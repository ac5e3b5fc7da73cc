"""Nodes that go, nodes that come, and nodes that others have taken."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.conftest import NODE_CPUS, NODES, Arena, started, trials
from tests.chaos.engine import POISON, UNLUCKY
from tests.chaos.harness import Trial, report, seeds, write_input

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
    # Few units in the hands of each engine: else three are enough for them.
    flags = ["--actors", str(NODES + 1), "--max-running", "10", "--wait-for-nodes", "120"]
    job = trial(*WHOLE_NODE, *flags).with_options(delay_s=3.0)
    # 60 s for three engines: a node takes ten to join and start one
    driver = job.start()
    job.wait_for(5, driver)
    late = arena.add()
    try:
        ended = job.end(driver)
        assert ended.code == 0, ended.said[-4000:]
        assert "4 engines on CPU (1 of them as nodes join)" in ended.said
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


def _hung(job: Trial, count: int) -> bool:
    return len(job.hangs()) == count


def test_a_node_dies_twice_under_the_same_row(arena: Arena, trial: Callable[..., Trial]) -> None:
    """A row that was alone on a node when that died is not at fault, so both rows of a pass come
    to the right end: it is answered, its neighbour, which kills the engine, is an error."""
    job = trial(r101=UNLUCKY, r103=POISON)
    driver = job.start()
    for count in (1, 2):
        assert job.until(partial(_hung, job, count), driver)
        arena.kill(job.hangs()[-1].node)
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report("node_later", 0, job.check(errors={103: "quarantined"}))


def test_one_node_is_left(arena: Arena, trial: Callable[..., Trial]) -> None:
    """Its CPUs are all taken by the engines: images are prepared all the same."""
    job = trial()
    driver = job.start()
    job.wait_for(10, driver)
    for node in list(arena.nodes)[1:]:
        arena.kill(node)
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    report("one_left", 0, job.check())


@contextmanager
def taken(arena: Arena) -> Iterator[None]:
    """All CPUs of the cluster are held by another job while the block runs."""
    code = (
        "import ray, time; ray.init(log_to_driver=False);"
        f"held = [ray.remote(num_cpus={NODE_CPUS})(type('Other', (), {{'here': lambda self: 1}}))"
        f".remote() for _ in range({NODES})];"
        "ray.get([one.here.remote() for one in held]); print('held', flush=True); time.sleep(900)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_ADDRESS": arena.address},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert any("held" in line for line in holder.stdout)
        yield
    finally:
        holder.kill()
        holder.wait()


def test_others_hold_all_cpus(arena: Arena, trial: Callable[..., Trial]) -> None:
    job = trial("--wait-for-nodes", "5")
    with taken(arena):
        ended = job.run()
        assert ended.code == 1
        assert "no room for an engine (1 CPUs and 0 GPUs)" in ended.said
        assert f"{NODES * NODE_CPUS} CPUs and 0 GPUs, of which 0 and 0 are free" in ended.said
        assert job.committed() == 0 and not job.engines()
        driver = job.start()
        job.until(lambda: "no room for an engine" in job.said(), driver)
    ended = job.end(driver)
    assert ended.code == 0, ended.said[-4000:]
    job.check()


def test_images_are_decoded_where_there_is_room(tmp_path: Path) -> None:
    """A node of nothing but CPUs, beside one whose engine takes its only CPU, decodes."""
    waits, nodes = {}, {}
    with started(nodes=0) as arena:
        with_gpu = arena.add(num_cpus=1, num_gpus=1)
        for case in ("alone", "beside"):
            if case == "beside":
                beside = arena.add(num_cpus=4)
            job = trials(arena, tmp_path / case)("--actors", "1", "--gpus-per-actor", "1")
            job.with_options(image_s=0.2, delay_s=0.01)
            job.expected = write_input(job.folder / "in", {}, padding=1 << 17)
            ended = job.run()
            assert ended.code == 0, ended.said[-4000:]
            cost = job.check()
            stats = job.stats()
            waits[case] = sum(stats.column("preprocess_wait_s").to_pylist())
            nodes[case] = set(stats.column("decode_node").to_pylist())
            assert set(stats.column("node").to_pylist()) == {with_gpu}
            report(f"decode_{case}", 0, cost | {"preprocess_wait_s": round(waits[case], 1)})
    # Where no CPU is left nothing is asked for, and any node may decode: the head too.
    assert beside not in nodes["alone"] and nodes["beside"] == {beside}
    assert waits["beside"] < 0.6 * waits["alone"], waits


def test_no_node_but_the_head_until_later(arena: Arena, trial: Callable[..., Trial]) -> None:
    arena.empty()
    job = trial(*WHOLE_NODE, "--wait-for-nodes", "120", refill=False)
    driver = job.start()
    job.until(lambda: "of them as nodes join" in job.said(), driver)
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
