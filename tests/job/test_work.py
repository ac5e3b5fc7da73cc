"""Units are handed out once, in runs, and come back."""

import random

from trio.job.input.units import Unit
from trio.job.work import WorkQueue

RUNS = [[Unit(shard, 10 * i, 10 * i + 10) for i in range(5)] for shard in range(3)]


def test_an_actor_keeps_to_its_run_and_then_takes_from_the_longest() -> None:
    queue = WorkQueue(RUNS)
    assert len(queue) == 15
    assert [queue.take("a") for _ in range(6)] == [*RUNS[0], RUNS[1][0]]
    assert [queue.take("b") for _ in range(5)] == RUNS[2]
    # Four are left of a's run: b takes the back two, and one of the others when these are done.
    assert [queue.take("b") for _ in range(2)] == RUNS[1][3:]
    assert queue.take("a") == RUNS[1][1]
    assert queue.take("b") == RUNS[1][2]
    assert queue.take("a") is None and queue.take("b") is None and not queue


def test_what_came_back_goes_out_first_and_a_lost_actors_run_next() -> None:
    queue = WorkQueue(RUNS)
    first = queue.take("a")
    assert first is not None and queue.take("b") == RUNS[1][0]
    queue.give_back([first])
    queue.forget("a")
    assert queue.take("b") == first
    assert queue.take("c") == RUNS[0][1]
    assert queue.take("b") == RUNS[1][1]


def test_nothing_is_lost_or_doubled_whatever_happens() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        queue = WorkQueue(RUNS)
        busy: list[tuple[str, Unit]] = []
        done: list[Unit] = []
        while queue or busy:
            actor = rng.choice("abcd")
            unit = queue.take(actor)
            if unit is not None:
                busy.append((actor, unit))
            if rng.random() < 0.1:
                queue.give_back([u for a, u in busy if a == actor])
                busy = [(a, u) for a, u in busy if a != actor]
                queue.forget(actor)
            elif busy and rng.random() < 0.7:
                done.append(busy.pop(rng.randrange(len(busy)))[1])
            assert len(queue) + len(busy) + len(done) == 15
        assert sorted(done) == [unit for run in RUNS for unit in run]
