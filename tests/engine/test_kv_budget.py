import random

import pytest

from trio.engine.kv_budget import PAGE, FreePages, PageAllocator


def allocator(
    pages: int, *, layers: tuple[int, ...] = (1,), running: int = 8, together: bool = False
) -> PageAllocator:
    return PageAllocator(
        pages=pages, group_layers=layers, max_running=running, together=together
    )  # fmt: skip


def test_a_request_takes_whole_pages_of_each_layer() -> None:
    room = allocator(100, layers=(2, 5))
    assert room.pages_of((95, 21)) == 2 * 6 + 5 * 2
    pages = room.allocate(1, (95, 21))
    assert list(map(len, pages)) == [6, 6, 2, 2, 2, 2, 2]
    assert room.free_pages == 100 - 22


def test_pruned_requests_fit_where_unpruned_ones_do_not() -> None:
    def held(need: tuple[int, int]) -> int:
        room = allocator(80, layers=(1, 9), running=100)
        while room.can_allocate(need):
            room.allocate(room.holders, need)
        return room.holders

    assert held((7 * PAGE, 7 * PAGE)) == 1
    assert held((7 * PAGE, PAGE)) == 5


def test_fits_looks_at_the_request_alone() -> None:
    room = allocator(7)
    room.allocate(1, (7 * PAGE,))
    assert room.fits((7 * PAGE,))
    assert not room.can_allocate((1,))
    assert not room.fits((7 * PAGE + 1,))


def test_several_are_asked_about_at_once() -> None:
    room = allocator(7)
    assert room.can_allocate((3 * PAGE,), (4 * PAGE,))
    assert not room.can_allocate((4 * PAGE,), (4 * PAGE,))


def test_no_more_than_max_running() -> None:
    room = allocator(100, running=3)
    for key in range(3):
        room.allocate(key, (10,))
    assert not room.can_allocate((10,))
    room.free(1)
    assert room.can_allocate((10,))
    assert not room.can_allocate((10,), (10,))


def test_a_key_holds_pages_once() -> None:
    room = allocator(10)
    room.allocate(1, (10,))
    with pytest.raises(AssertionError):
        room.allocate(1, (10,))
    room.free(1)
    with pytest.raises(KeyError):
        room.free(1)


def test_neighbours_are_taken_layer_by_layer_where_no_run_holds_them_all() -> None:
    room = allocator(10, layers=(2,), together=True)
    for key in range(5):
        room.allocate(key, (PAGE,))
    for key in (0, 2):
        room.free(key)
    assert [own.tolist() for own in room.allocate(9, (2 * PAGE,))] == [[1, 2], [5, 6]]
    for key in (1, 3):
        room.free(key)
    assert not room.can_allocate((3 * PAGE,))  # four pages are free, in two pieces
    assert room.can_allocate((2 * PAGE,))


@pytest.mark.parametrize("together", [False, True])
def test_random_coming_and_going_gives_each_page_to_one(together: bool) -> None:
    chance = random.Random(4)
    room = allocator(300, layers=(1, 3), running=20, together=together)
    held: dict[int, list[int]] = {}
    for key in range(500):
        need = (chance.randint(1, 600), chance.randint(1, 200))
        if room.can_allocate(need):
            pages = room.allocate(key, need)
            if together:
                assert all(own[-1] - own[0] == len(own) - 1 for own in pages)
            held[key] = [page for own in pages for page in own.tolist()]
        elif held:
            gone = chance.choice(list(held))
            room.free(gone)
            del held[gone]
        taken = [page for own in held.values() for page in own]
        assert len(set(taken)) == len(taken) == room.pages - room.free_pages
        assert not taken or 1 <= min(taken) <= max(taken) <= 300
    assert len(held) > 2
    for key in held:
        room.free(key)
    assert room.allocate(-1, (150 * PAGE, 50 * PAGE))[0][0] == 1  # all in one piece again


def test_neighbours_that_are_given_back_join() -> None:
    free = FreePages(1, 11)
    runs = [free.take(2) for _ in range(5)]
    for (run,) in (runs[0], runs[4], runs[2], runs[1], runs[3]):
        free.give(*run)
    assert free.take(10) == [(1, 11)]
