import random

import pytest

from trio.engine.kv_budget import PAGE, FreePages, PageAllocator


def allocator(
    pages: int, *, layers: tuple[int, ...] = (1,), running: int = 8, together: bool = False
) -> PageAllocator:
    return PageAllocator(
        pages=pages, group_layers=layers, max_running=running, together=together
    )  # fmt: skip


def pages_for(room: PageAllocator, key: int, need: tuple[int, ...]) -> list[list[int]]:
    pages = room.allocate(key, need)
    assert pages is not None
    return [own.tolist() for own in pages]


def test_a_request_takes_whole_pages_of_each_layer() -> None:
    room = allocator(100, layers=(2, 5))
    assert room.pages_of((95, 21)) == 2 * 6 + 5 * 2
    pages = pages_for(room, 1, (95, 21))
    assert list(map(len, pages)) == [6, 6, 2, 2, 2, 2, 2]
    assert room.free_pages == 100 - 22


def test_pruned_requests_fit_where_unpruned_ones_do_not() -> None:
    def held(need: tuple[int, int]) -> int:
        room = allocator(80, layers=(1, 9), running=100)
        while room.allocate(room.holders, need) is not None:
            pass
        return room.holders

    assert held((7 * PAGE, 7 * PAGE)) == 1
    assert held((7 * PAGE, PAGE)) == 5


def test_fits_looks_at_the_request_alone() -> None:
    room = allocator(7)
    room.allocate(1, (7 * PAGE,))
    assert room.fits((7 * PAGE,))
    assert room.count_fitting([(1,)]) == 0
    assert not room.fits((7 * PAGE + 1,))


def test_several_are_asked_about_at_once() -> None:
    room = allocator(7)
    assert room.count_fitting([(3 * PAGE,), (4 * PAGE,)]) == 2
    assert room.count_fitting([(4 * PAGE,), (4 * PAGE,), (PAGE,)]) == 1
    assert room.count_fitting([(3 * PAGE,), (4 * PAGE,), (PAGE,)]) == 2
    assert room.free_pages == 7


def test_no_more_than_max_running() -> None:
    room = allocator(100, running=3)
    for key in range(3):
        room.allocate(key, (10,))
    assert room.count_fitting([(10,)]) == 0
    room.free(1)
    assert room.count_fitting([(10,)]) == 1
    assert room.count_fitting([(10,), (10,)]) == 1


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
    assert pages_for(room, 9, (2 * PAGE,)) == [[1, 2], [5, 6]]
    for key in (1, 3):
        room.free(key)
    assert room.allocate(10, (3 * PAGE,)) is None
    assert room.count_fitting([(3 * PAGE,)]) == 0  # four pages are free, in two pieces
    assert room.count_fitting([(2 * PAGE,)]) == 1


@pytest.mark.parametrize("together", [False, True])
def test_random_coming_and_going_gives_each_page_to_one(together: bool) -> None:
    chance = random.Random(4)
    room = allocator(300, layers=(1, 3), running=20, together=together)
    held: dict[int, list[int]] = {}
    for key in range(500):
        need = (chance.randint(1, 600), chance.randint(1, 200))
        pages = room.allocate(key, need)
        assert room.holders == len(held) + (pages is not None)
        if pages is not None:
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
    assert pages_for(room, -1, (150 * PAGE, 50 * PAGE))[0][0] == 1  # all in one piece again


def test_neighbours_that_are_given_back_join() -> None:
    free = FreePages(1, 11)
    runs = [free.take(2) or [] for _ in range(5)]
    assert free.take(1) is None
    for (run,) in (runs[0], runs[4], runs[2], runs[1], runs[3]):
        free.give(*run)
    assert free.take(10) == [(1, 11)]
