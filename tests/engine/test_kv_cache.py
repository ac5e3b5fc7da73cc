"""The cache against a dictionary of plain lists that is told the same story."""

import random

import pytest
import torch

from trio.engine.kv_cache import KVCache

LAYERS, HEADS, DIM = 5, 2, 3
STARTS = (0, 1, 3)


def cache(*, budget: int = 1 << 24, max_slots: int = 8) -> KVCache:
    return KVCache(
        group_starts=STARTS,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget=budget,
        max_slots=max_slots,
    )


def packed(tokens: int, layer: int, salt: int) -> torch.Tensor:
    """`[1, K, T, E]` of recognisable numbers."""
    generator = torch.Generator().manual_seed(1000 * salt + layer)
    return torch.randn(1, HEADS, tokens, DIM, generator=generator)


class Story:
    """Drives a cache, and keeps what must be in it: per request and layer, a `[K, L, E]`."""

    def __init__(self, store: KVCache) -> None:
        self.store = store
        self.truth: dict[int, list[torch.Tensor]] = {}
        self.salt = 0

    def admit(self, lengths: dict[int, tuple[int, ...]], room: int = 5) -> None:
        for key, row in lengths.items():
            self.store.allocate(key, tuple(length + room for length in row))
        writer = self.store.prefill(list(lengths))
        self.salt += 1
        for key in lengths:
            self.truth[key] = []
        for group, (start, stop) in enumerate(self.store.spans):
            here = [row[group] for row in lengths.values()]
            writer.begin_prefill(start, here)
            for layer in range(start, stop):
                keys = packed(sum(here), layer, self.salt)
                assert writer.update(keys, -keys, layer)[0] is keys
                for key, piece in zip(lengths, keys[0].split(here, dim=1), strict=True):
                    self.truth[key].append(piece)

        nothing = [0] * len(self.store.spans)
        self.store.start(list(lengths), [0] * len(lengths), [nothing] * len(lengths))

    def decode(self) -> None:
        self.store.extend()
        step = self.store.writer()
        self.salt += 1
        for layer in range(LAYERS):
            new = packed(len(self.store.order), layer, self.salt)
            keys, values = step.update(new, -new, layer)
            for slot, key in enumerate(self.store.order):
                expected = torch.cat([self.truth[key][layer], new[0, :, slot : slot + 1]], dim=1)
                self.truth[key][layer] = expected
                length = expected.shape[1]
                assert torch.equal(keys[slot, :, :length], expected)
                assert torch.equal(values[slot, :, :length], -expected)

    def free(self, key: int) -> None:
        self.store.free(key)
        del self.truth[key]


def test_each_layer_group_keeps_its_own_length() -> None:
    story = Story(cache())
    story.admit({1: (9, 4, 2), 2: (3, 3, 3)})
    story.decode()
    assert story.store.lengths_of(1) == (10, 5, 3)
    assert story.store.lengths_of(2) == (4, 4, 4)


def test_bytes_are_those_of_the_stored_tensors() -> None:
    story = Story(cache())
    story.admit({1: (9, 4, 2)})
    assert story.store.used_bytes == 2 * sum(piece.nbytes for piece in story.truth[1])


def test_layers_after_a_stage_take_less_memory() -> None:
    story = Story(cache())
    story.admit({1: (600, 60, 10)})
    widths = [tensor.shape[2] for tensor in story.store._keys]
    assert widths == [640, 128, 128, 64, 64]
    assert story.store.allocated_bytes == story.store.room.bytes_of(story.store.room.shape)


def test_freeing_moves_the_last_row_into_the_hole() -> None:
    story = Story(cache())
    story.admit({1: (4, 2, 1), 2: (5, 3, 2), 3: (7, 6, 5)})
    story.free(1)
    assert story.store.order == [3, 2]
    story.decode()


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_memory_that_runs_out_while_growing_leaves_the_running_ones_whole(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(cache())
    story.admit({1: (9, 4, 2)})
    make, made = story.store._rectangle, []

    def give_out(slots: int, capacity: int) -> torch.Tensor:
        made.append(capacity)
        if len(made) > 2 * layer:
            raise torch.OutOfMemoryError("no memory left")
        return make(slots, capacity)

    monkeypatch.setattr(story.store, "_rectangle", give_out)
    with pytest.raises(MemoryError):
        story.admit({2: (300, 200, 100)})
    monkeypatch.undo()
    assert (story.store.order, story.store.room.holders) == ([1], 1)
    story.decode()
    story.admit({3: (300, 200, 100)})
    story.decode()
    story.free(1)
    story.decode()


@pytest.mark.parametrize("seed", range(2))
def test_random_coming_and_going_keeps_every_request_whole(seed: int) -> None:
    chance = random.Random(seed)
    story = Story(cache(budget=150_000, max_slots=6))
    following = 0
    for _ in range(60):
        wide = chance.randint(1, 200)
        lengths = (wide, max(1, wide // 3), max(1, wide // 9))
        if story.store.can_allocate(tuple(length + 60 for length in lengths)):
            story.admit({following: lengths}, room=60)
            following += 1
        if story.store.order:
            story.decode()
        if chance.random() < 0.3 and story.store.order:
            story.free(chance.choice(list(story.truth)))
        assert story.store.allocated_bytes <= 150_000
    assert following > 10
    for key in list(story.truth):
        story.free(key)
    assert story.store.used_bytes == 0
    assert story.store.room.holders == 0


def test_what_is_not_filled_is_finite() -> None:
    story = Story(cache())
    story.admit({1: (3, 2, 1), 2: (90, 80, 70)})
    story.store.extend()
    step = story.store.writer()
    keys, _ = step.update(*(packed(2, 0, 9),) * 2, 0)
    assert keys.shape == (2, HEADS, 91, DIM)
    assert torch.isfinite(keys).all()
