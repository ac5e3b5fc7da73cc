"""Two thousand mixed requests through one engine: all are answered, and nothing stays behind."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from tests.engine.support import MANY_SIZES, picture
from tests.tiny.llava import LLAVA_NEXT, PINPOINTS, WORDS, tiny_llava, tiny_processor
from trio.engine.engine import Engine
from trio.engine.request import Request, Sampling
from trio.pruning.options import Pruning

WARM, TRACED, REQUESTS = 400, 1750, 2000
"""Tensors are counted after the first of them and at the end; from the second on, which takes
longer, also what Python allocates. What is kept once for all requests is there by then."""
PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]


class Live(NamedTuple):
    """Tensors that Python can reach, apart from the rectangles of the cache."""

    tensors: int
    bytes: int


def live(engine: Engine) -> Live:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return Live(len(tensors), sum(storages.values()) - engine._cache.allocated_bytes)


def is_broken(number: int) -> bool:
    return number % 50 == 7


def mixed(numbers: range) -> Iterator[Request]:
    """0 to 3 images, prompts of 1 to 400 words, answers of 1 to 128 tokens; some are too long."""
    for number in numbers:
        chance = random.Random(number)
        words = 1200 if is_broken(number) else chance.randint(1, 400)
        seed = number if number % 3 == 0 else None
        yield Request(
            prompt=" ".join(chance.choices(WORDS, k=words)),
            images=tuple(chance.choices(PICTURES, k=chance.randint(0, 3))),
            id=number,
            sampling=Sampling(
                max_new_tokens=chance.randint(1, 128),
                temperature=0.0 if seed is None else 1.0,
                seed=seed,
                ignore_eos=chance.random() < 0.9,
            ),
        )


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind() -> None:
    model = tiny_llava(layers=2, spread=0.4, **LLAVA_NEXT)
    engine = Engine(
        model,
        tiny_processor(patch_size=8, pinpoints=PINPOINTS),
        pruning=Pruning(schedule="1:0.3"),
        kv_bytes=20_000_000,
        batch_tokens=4096,
        max_running=128,
    )
    answered = [0] * REQUESTS
    failed, some = set(), {}

    def serve(numbers: range) -> None:
        for result in engine.generate(mixed(numbers)):
            answered[result.id] += 1
            if result.error:
                failed.add(result.id)
            elif result.id % 200 == 0:
                some[result.id] = result.token_ids

    serve(range(WARM))
    before = live(engine)
    serve(range(WARM, TRACED))
    tracemalloc.start()
    try:
        serve(range(TRACED, REQUESTS))
        after = live(engine)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert answered == [1] * REQUESTS
    assert failed == set(filter(is_broken, range(REQUESTS)))
    cache = engine._cache
    assert cache.room.holders == cache.used_bytes == 0 and not cache.order
    assert cache.allocated_bytes <= 20_000_000
    stats = engine.stats()
    assert stats["requests"] + stats["failed"] == REQUESTS
    assert stats["running_mean"] > 20
    # For each request less than half a tensor, 100 bytes of tensors, 1,500 bytes of other objects.
    # Some 200 kB of these are there at any time.
    assert after.tensors - before.tensors < (REQUESTS - WARM) / 2
    assert after.bytes - before.bytes < 100 * (REQUESTS - WARM)
    assert kept < 1500 * (REQUESTS - TRACED)
    for key, tokens in some.items():
        (alone,) = engine.generate(mixed(range(key, key + 1)))
        assert alone.token_ids == tokens
