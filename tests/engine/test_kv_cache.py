"""The cache against a dictionary of plain lists that is told the same story."""

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from trio.decoder import gpu
from trio.decoder.attention import Branches, Packed, Padded
from trio.engine.kv_budget import PAGE
from trio.engine.kv_cache import KVCache

LAYERS, HEADS, DIM = 5, 2, 3
STARTS = (0, 1, 3)
QUERIES = 2 * HEADS
"""Two of each key head."""


def cache(
    *, together: bool, budget: int = 1 << 20, max_running: int = 8, fill: bool = True
) -> KVCache:
    """`together`: as on a CPU, else as on a GPU, with a table on the device that is not the host's.
    `fill`: let all that is not stored be NaN."""
    with mock.patch.object(gpu, "_pretended", not together):
        made = KVCache(
            group_starts=STARTS,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            dtype=torch.float32,
            device=torch.device("cpu"),
            budget=budget,
            max_running=max_running,
        )
    own = made._table.ctypes.data == made._table_on_device.data_ptr()
    assert own == made.room.together == together
    if fill:
        made.pool.fill_(torch.nan)
    return made


def packed(tokens: int, layer: int, salt: int, heads: int = HEADS) -> torch.Tensor:
    """`[1, heads, T, E]` of recognisable numbers."""
    generator = torch.Generator().manual_seed(1000 * salt + layer)
    return torch.randn(1, heads, tokens, DIM, generator=generator)


class Story:
    """Drives a cache, and keeps what must be in it: per request and layer, a `[K, L, E]`."""

    def __init__(self, store: KVCache) -> None:
        self.store = store
        self.truth: dict[int, list[torch.Tensor]] = {}
        self.salt = 0

    def admit(self, lengths: dict[int, tuple[int, ...]], room: int = 5) -> None:
        for key, row in lengths.items():
            need = tuple(length + room for length in row)
            assert self.store.allocate(key, need) == len(self.store.order) - 1
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
        positions = [[row[0]] * len(self.store.spans) for row in lengths.values()]
        self.store.start(list(lengths), list(lengths), positions)

    def decode(self, more_rows: int = 0) -> None:
        """A step, held against attention over a rectangle with a mask."""
        self.store.extend()
        count = len(self.store.order)
        rows = None if self.store.room.together else count + more_rows
        step = self.store.writer(rows)
        self.salt += 1
        for layer in range(LAYERS):
            new = packed(rows or count, layer, self.salt)
            query = packed(rows or count, layer, -self.salt, QUERIES)
            got = step.layout(layer).attend(query, *step.update(new, -new, layer), 0.7)
            lengths = []
            for row, key in enumerate(self.store.order):
                whole = torch.cat([self.truth[key][layer], new[0, :, row : row + 1]], dim=1)
                self.truth[key][layer] = whole
                lengths.append(whole.shape[1])
            keys = torch.zeros(count, HEADS, max(lengths), DIM)
            for row, key in enumerate(self.store.order):
                keys[row, :, : lengths[row]] = self.truth[key][layer]
            rectangle = Padded(torch.tensor(lengths))
            expected = rectangle.attend(query[:, :, :count], keys, -keys, 0.7)
            torch.testing.assert_close(got[:, :count], expected, rtol=1e-5, atol=1e-5)

    def look_back(self) -> None:
        """Continuations over what is stored, held against attention of whole sequences."""
        keys = list(self.truth)
        branches = Branches.of([[1, 2]] * len(keys), torch.device("cpu"))
        reader = self.store.branches(keys, branches)
        for group, (start, stop) in enumerate(self.store.spans):
            layout = reader.begin(group)
            for layer in range(start, stop):
                new = packed(3 * len(keys), layer, 5)
                query = packed(3 * len(keys), layer, 6, QUERIES)
                got = layout.attend(query, *reader.update(new, -new, layer), 0.7)
                for row, key in enumerate(keys):
                    own = slice(3 * row + 1, 3 * row + 3)
                    whole = torch.cat([self.truth[key][layer], new[0, :, own]], dim=1)[None]
                    length = whole.shape[2]
                    asked = packed(length, layer, 6, QUERIES)
                    asked[:, :, -2:] = query[:, :, own]
                    expected = Packed((length,)).attend(asked, whole, -whole, 0.7)[:, -2:]
                    torch.testing.assert_close(got[:, own], expected, rtol=1e-5, atol=1e-5)

    def free(self, key: int) -> None:
        self.store.free(key)
        del self.truth[key]


@pytest.fixture(params=[True, False], ids=["in-runs", "in-pages"])
def together(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_each_layer_group_keeps_its_own_length(together: bool) -> None:
    story = Story(cache(together=together))
    story.admit({1: (9, 4, 2), 2: (3, 3, 3)})
    story.decode()
    assert story.store.lengths_of(1) == (10, 5, 3)
    assert story.store.lengths_of(2) == (4, 4, 4)


def test_bytes_are_those_of_the_stored_tensors(together: bool) -> None:
    story = Story(cache(together=together))
    story.admit({1: (9, 4, 2)})
    assert story.store.used_bytes == 2 * sum(piece.nbytes for piece in story.truth[1])


def test_freeing_moves_the_last_row_into_the_hole(together: bool) -> None:
    story = Story(cache(together=together))
    story.admit({1: (4, 2, 1), 2: (5, 3, 2), 3: (7, 6, 5)})
    story.free(1)
    assert story.store.order == [3, 2]
    rows = story.store.rows
    assert rows.token_B[:3].tolist() == [3, 2, 0]
    assert rows.length_GB[:, :3].tolist() == [[7, 5, 0], [6, 3, 0], [5, 2, 0]]
    assert rows.position_GB[0, :3].tolist() == [6, 4, 0]
    story.decode()
    assert rows.position_GB[0, :3].tolist() == [7, 5, 0]


@pytest.mark.parametrize("seed", range(2))
def test_random_coming_and_going_keeps_every_request_whole(seed: int, together: bool) -> None:
    chance = random.Random(seed)
    story = Story(cache(budget=150_000, max_running=6, together=together))
    pool, following = story.store.pool.data_ptr(), 0
    for _ in range(60):
        wide = chance.randint(1, 200)
        lengths = (wide, max(1, wide // 3), max(1, wide // 9))
        if story.store.count_fitting([tuple(length + 60 for length in lengths)]):
            story.admit({following: lengths}, room=60)
            following += 1
        if story.store.order:
            story.decode(more_rows=chance.randint(0, 6 - len(story.store.order)))
        if chance.random() < 0.3 and story.store.order:
            story.free(chance.choice(list(story.truth)))
    assert following > 10
    assert story.store.pool.data_ptr() == pool and story.store.pool.nbytes <= 150_000
    if story.truth:
        story.look_back()
    for key in list(story.truth):
        story.free(key)
    assert story.store.used_bytes == story.store.room.holders == 0
    assert story.store.room.free_pages == story.store.room.pages


def test_requests_alike_are_read_at_once() -> None:
    """On a CPU, as each call costs as much as reading some hundred keys."""
    story = Story(cache(together=True))
    story.admit({1: (40, 20, 9), 2: (40, 20, 9), 3: (40, 20, 9), 4: (7, 6, 5), 5: (40, 20, 9)})
    story.decode()
    layout = story.store.writer().layout(2)
    assert sorted(run.requests for run in layout.runs) == [1, 1, 3]  # type: ignore[union-attr]
    story.free(2)
    story.decode()


def test_the_table_grows_with_the_longest_request(together: bool) -> None:
    story = Story(cache(together=together))
    story.admit({1: (9, 4, 2)})
    before = story.store.generation
    story.admit({2: (600, 60, 10)}, room=200)
    assert story.store.generation == before + 1
    story.decode()
    story.admit({3: (40 * PAGE, 3, 2)})
    assert story.store.generation == before + 1
    story.decode()


def test_where_the_table_cannot_grow_a_request_waits(
    together: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story(cache(together=together))
    store, long, free = story.store, (600, 60, 10), story.store.room.free_pages

    def brought(table: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left\nmore")

    story.admit({1: (9, 4, 2)})
    with monkeypatch.context() as short:
        short.setattr(store, "_brought", brought)
        held = store.room.free_pages, store.generation
        assert store.allocate(2, long) is store.allocate(2, long) is None
        assert (store.room.free_pages, store.generation) == held and store.order == [1]
        assert len(caplog.messages) == 1 and "requests wait" in caplog.text
        story.decode()
        story.free(1)
        with pytest.raises(torch.OutOfMemoryError):  # nobody is there whose end could help
            store.allocate(2, long)
    assert store.room.free_pages == free and store.room.holders == 0
    story.admit({2: long, 3: (9, 4, 2)})
    story.decode()
    story.free(2)
    story.decode()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
def test_on_a_cpu_only_what_is_written_takes_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    story = Story(cache(together=True, budget=1 << 30, fill=False))
    for key in range(8):
        story.admit({key: (9, 4, 2)}, room=8)
        story.decode()
    assert story.store.allocated_bytes > 0.99 * (1 << 30)
    assert resident() - before < 1 << 27
