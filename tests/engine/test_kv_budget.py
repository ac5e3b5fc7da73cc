import pytest

from trio.engine.kv_budget import KVBudget, Shape


def room(budget: int, *, group_bytes: tuple[int, ...] = (1,), max_slots: int = 8) -> KVBudget:
    return KVBudget(budget=budget, group_bytes=group_bytes, max_slots=max_slots, block=10)


def test_layers_after_a_stage_take_the_smaller_capacity() -> None:
    shape = room(10_000, group_bytes=(2, 5)).allocate(1, (95, 21))
    assert shape == Shape(1, (100, 30))
    assert room(0, group_bytes=(2, 5)).bytes_of(shape) == 2 * 100 + 5 * 30


def test_pruned_requests_fit_where_unpruned_ones_do_not() -> None:
    def held(need: tuple[int, int]) -> int:
        cache = room(1000, group_bytes=(1, 9), max_slots=100)
        while cache.can_allocate(need):
            cache.allocate(cache.holders, need)
        return cache.holders

    assert held((100, 100)) == 1
    assert held((100, 10)) == 5


def test_slots_grow_with_slack_and_tighten_when_slack_does_not_fit() -> None:
    cache = room(700)
    slots = []
    while cache.can_allocate((100,)):
        slots.append(cache.allocate(cache.holders, (100,)).slots)
    assert slots == [1, 2, 4, 4, 5, 6, 7]


def test_a_wide_request_widens_all_rows_and_is_refused_where_that_is_too_much() -> None:
    cache = room(500)
    for key in range(4):
        cache.allocate(key, (50,))
    assert not cache.can_allocate((110,))
    assert cache.can_allocate((100,))
    assert cache.allocate(9, (100,)) == Shape(5, (100,))


def test_rows_of_those_that_left_are_given_up_for_a_tight_shape() -> None:
    cache = room(400)
    for key in range(4):
        cache.allocate(key, (100,))
    assert not cache.can_allocate((200,))
    for key in range(3):
        cache.free(key)
    assert cache.allocate(9, (200,)) == Shape(2, (200,))


def test_fits_looks_at_the_request_alone() -> None:
    cache = room(100)
    cache.allocate(1, (100,))
    assert cache.fits((100,))
    assert not cache.can_allocate((100,))
    assert not cache.fits((101,))


def test_no_more_than_max_slots() -> None:
    cache = room(10_000, max_slots=3)
    for key in range(3):
        cache.allocate(key, (10,))
    assert cache.shape.slots == 3
    assert not cache.can_allocate((10,))
    cache.free(1)
    assert cache.can_allocate((10,))


def test_a_key_holds_room_once() -> None:
    cache = room(100)
    cache.allocate(1, (10,))
    with pytest.raises(AssertionError):
        cache.allocate(1, (10,))
    cache.free(1)
    with pytest.raises(KeyError):
        cache.free(1)
