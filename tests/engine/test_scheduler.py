import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from trio.engine.kv_budget import PAGE, PageAllocator
from trio.engine.scheduler import LONGEST_HOLD, MANY_REQUESTS, Scheduler


@dataclass(frozen=True)
class Job:
    key: int
    prompt_tokens: int
    output_tokens: int = 0

    @property
    def need(self) -> tuple[int, ...]:
        return (self.prompt_tokens + self.output_tokens,)


def scheduler(
    *, batch_tokens: int = 1000, pages: int = 1000, max_running: int = 8
) -> tuple[Scheduler[Job], PageAllocator]:
    room = PageAllocator(pages=pages, group_layers=(1,), max_running=max_running)
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
    line, _ = scheduler(pages=10)
    wide, narrow = Job(1, 6 * PAGE, 2 * PAGE), Job(2, PAGE)
    first = Job(0, 5 * PAGE)
    for job in (first, wide, narrow):
        line.add(job)
    assert keys(line.admit()) == [0]
    assert line.admit() == []
    line.finish(first)
    assert keys(line.admit()) == [1, 2]


def test_clear_gives_all_memory_back() -> None:
    line, room = scheduler(max_running=2)
    for key in range(5):
        line.add(Job(key, 10))
    line.admit()
    assert room.holders == 2
    line.clear()
    assert room.holders == 0
    assert not line.has_work


def full(running: int, waiting: int, **options: int) -> Scheduler[Job]:
    """So many run, which is all that may, and more wait."""
    line, _ = scheduler(**{"batch_tokens": 10_000, "max_running": running, **options})
    for key in range(running + waiting):
        line.add(Job(key, 10))
    assert len(line.admit()) == running
    return line


def finish(line: Scheduler[Job], count: int) -> None:
    for job in list(line.running.values())[:count]:
        line.finish(job)


def test_requests_come_in_together() -> None:
    line = full(running=100, waiting=200)
    finish(line, MANY_REQUESTS - 1)
    assert line.admit() == []
    finish(line, 1)
    assert keys(line.admit()) == list(range(100, 100 + MANY_REQUESTS))


def test_a_quarter_of_those_that_could_run_is_enough() -> None:
    line = full(running=20, waiting=50)
    finish(line, 5)
    assert line.admit() == []
    finish(line, 1)
    assert len(line.admit()) == 6


def test_half_the_tokens_of_a_step_are_enough() -> None:
    line, _ = scheduler(batch_tokens=10_000, max_running=100)
    for key in range(99):
        line.add(Job(key, 10))
    line.admit()
    for key in range(99, 110):
        line.add(Job(key, 6000 if key == 99 else 10))
    assert keys(line.admit()) == [99]


def test_all_that_wait_come_in_at_once() -> None:
    line = full(running=100, waiting=2)
    finish(line, 1)
    assert line.admit() == []
    finish(line, 1)
    assert keys(line.admit()) == [100, 101]


def test_nobody_is_held_back_for_long() -> None:
    line = full(running=100, waiting=50)
    finish(line, 1)
    for _ in range(2):
        assert [keys(line.admit()) for _ in range(LONGEST_HOLD + 1)] == [[]] * LONGEST_HOLD + [
            [min(line.running) + 99]
        ]
        finish(line, 1)


def test_every_request_is_served_once_whatever_the_mix() -> None:
    chance = random.Random(3)
    line, room = scheduler(batch_tokens=120, pages=40, max_running=5)
    jobs = [Job(key, chance.randint(1, 200), chance.randint(1, 100)) for key in range(300)]
    coming, served = list(jobs), []
    while coming or line.has_work:
        for _ in range(min(len(coming), chance.randint(0, 4))):
            line.add(coming.pop(0))
        served += keys(line.admit())
        assert len(line.running) <= 5
        if line.running:
            line.finish(chance.choice(list(line.running.values())))
    assert served == list(range(300))
    assert room.holders == 0


GROUPS = (8, 8, 16)
"""Layers before, between and behind two stages."""


@dataclass(eq=False)
class Answer:
    """prompt_tokens: of which pruning leaves a third and then a ninth, where `is_pruned`."""

    key: int
    prompt_tokens: int
    is_pruned: bool
    output_tokens: int

    def __post_init__(self) -> None:
        parts = (1, 3, 9) if self.is_pruned else (1, 1, 1)
        self.need = tuple(self.prompt_tokens // part + self.output_tokens for part in parts)

    @property
    def reserved(self) -> int:
        return sum(tokens * layers for tokens, layers in zip(self.need, GROUPS, strict=True))


def answers(count: int) -> Iterator[Answer]:
    """300 to 16,000 tokens, small ones being more frequent; answers of 16 to 512."""
    chance = random.Random(0)
    for key in range(count):
        tokens = int(300 * (16_000 / 300) ** chance.random())
        yield Answer(key, tokens, chance.random() < 0.5, chance.randint(16, 512))


def test_a_saturated_pool_is_full_of_tokens() -> None:
    """400,000 tokens in each layer. Saturated: from when the first request finds no room until the
    last one comes in. Tokens are counted after each step's admission, whole answers included."""
    pages = 25_000 * sum(GROUPS)
    room = PageAllocator(pages=pages, group_layers=GROUPS, max_running=10_000)
    line: Scheduler[Answer] = Scheduler(room, batch_tokens=65_536)
    for answer in answers(2000):
        line.add(answer)
    shares: list[float] = []
    ends: defaultdict[int, list[Answer]] = defaultdict(list)
    step = held = 0
    while line.has_work:
        for answer in line.admit():
            ends[step + answer.output_tokens].append(answer)
            held += answer.reserved
        if line.waiting and (shares or not room.count_fitting([line.waiting[0].need])):
            shares.append(held / (pages * PAGE))
        step += 1
        for answer in ends.pop(step, ()):
            line.finish(answer)
            held -= answer.reserved
    assert len(shares) > 500 and held == room.holders == 0
    assert sum(shares) / len(shares) >= 0.95
    assert room.free_pages == pages
