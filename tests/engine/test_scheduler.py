import random
from dataclasses import dataclass

from trio.engine.kv_budget import KVBudget
from trio.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Job:
    key: int
    prompt_tokens: int
    output_tokens: int = 0

    @property
    def need(self) -> tuple[int, ...]:
        return (self.prompt_tokens + self.output_tokens,)


def scheduler(
    *, batch_tokens: int = 1000, budget: int = 10_000, max_running: int = 8
) -> tuple[Scheduler[Job], KVBudget]:
    room = KVBudget(budget=budget, group_bytes=(1,), max_slots=max_running, block=1)
    return Scheduler(room, batch_tokens=batch_tokens), room


def keys(jobs: list[Job]) -> list[int]:
    return [job.key for job in jobs]


def test_admits_in_order_up_to_the_token_budget() -> None:
    line, _ = scheduler(batch_tokens=100)
    for key, tokens in enumerate((40, 50, 20, 10)):
        line.add(Job(key, tokens))
    assert keys(line.admit()) == [0, 1]
    assert keys(line.admit()) == [2, 3]
    assert line.admit() == []


def test_running_requests_take_their_token_from_the_budget() -> None:
    line, _ = scheduler(batch_tokens=10)
    line.add(Job(0, 4))
    line.admit()
    line.add(Job(1, 5))
    line.add(Job(2, 5))
    assert keys(line.admit()) == [1]


def test_a_prompt_above_the_budget_comes_in_alone() -> None:
    line, _ = scheduler(batch_tokens=10)
    for key, tokens in enumerate((5, 50, 5)):
        line.add(Job(key, tokens))
    assert [keys(line.admit()) for _ in range(3)] == [[0], [1], [2]]


def test_what_does_not_fit_waits_and_is_not_overtaken() -> None:
    line, _ = scheduler(budget=100)
    wide, narrow = Job(1, 60, 20), Job(2, 10)
    first = Job(0, 50)
    for job in (first, wide, narrow):
        line.add(job)
    assert keys(line.admit()) == [0]
    assert line.admit() == []
    line.finish(first)
    assert keys(line.admit()) == [1]
    line.finish(wide)
    assert keys(line.admit()) == [2]


def test_clear_gives_all_memory_back() -> None:
    line, room = scheduler(max_running=2)
    for key in range(5):
        line.add(Job(key, 10))
    line.admit()
    assert room.holders == 2
    line.clear()
    assert room.holders == 0
    assert not line.has_work


def test_every_request_is_served_once_whatever_the_mix() -> None:
    chance = random.Random(3)
    line, room = scheduler(batch_tokens=120, budget=600, max_running=5)
    jobs = [Job(key, chance.randint(1, 200), chance.randint(1, 100)) for key in range(300)]
    coming, served = list(jobs), []
    while coming or line.has_work:
        for _ in range(min(len(coming), chance.randint(0, 4))):
            line.add(coming.pop(0))
        served += keys(line.admit())
        assert len(line.running) <= 5
        assert room.bytes_of(room.shape) <= room.budget
        if line.running:
            line.finish(chance.choice(list(line.running.values())))
    assert served == list(range(300))
    assert room.holders == 0
