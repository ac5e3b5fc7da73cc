"""The engine with LLaVA-NeXT, whose images give a number of visual tokens of their own each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import (
    MANY_SIZES,
    assert_lively,
    batch_inputs,
    by_id,
    expected_tokens,
    lively_llava,
    mixed_requests,
    picture,
    tokens,
)
from tests.models import LLAVA_NEXT, PINPOINTS, save_tiny_checkpoint, tiny_processor
from trio.config import Pruning
from trio.engine.engine import Engine
from trio.engine.plan import TEXT_TOKENS
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.patching import patch
from trio.pruning.schedule import tokens_per_layer

PROCESSOR = tiny_processor(patch_size=8, pinpoints=PINPOINTS)
LAYERS = 6
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
}
PRUNINGS = {
    "trio": Pruning(retention=0.4),
    "counts": Pruning(schedule="1:30,4:20", position_ids="keep"),
    "shares-from-embeddings": Pruning(schedule="0:0.5,3:0.2", method="gradient"),
    "random": Pruning(schedule="1:0.4", method="random", seed=3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_llava(**LLAVA_NEXT)


def engine(model: Any, pruning: Pruning | None = None, **options: Any) -> Engine:
    return Engine(model, PROCESSOR, pruning=pruning, kv_bytes=1 << 26, **options)


def requests_of_many_sizes(count: int, *, seed: int = 0, **sampling: Any) -> list[Request]:
    """Also one with every size, and so with more images than any other."""
    requests = mixed_requests(count, seed=seed, sizes=MANY_SIZES, **sampling)
    album = tuple(picture(n, size) for n, size in enumerate(MANY_SIZES))
    last = Sampling(**{"max_new_tokens": 9, **sampling})
    return [*requests, Request(prompt="how many", images=album, id=count, sampling=last)]


def of_one_batch(model: Any, requests: Sequence[Request], new: int) -> dict[Any, list[int]]:
    """What `generate` answers to all of them as one padded batch."""
    inputs = batch_inputs(PROCESSOR, requests)
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    end = model.generation_config.eos_token_id
    answers = {}
    for request, row in zip(requests, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        answers[request.id] = row[: row.index(end) + 1] if end in row else row
    return answers


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_unpruned_equals_generate(options: Any) -> None:
    model = lively_llava(**LLAVA_NEXT, **options)
    requests = requests_of_many_sizes(16)
    expected = expected_tokens(model, PROCESSOR, requests)
    assert_lively(expected)
    late = engine(model, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    assert tokens(engine(model).generate(requests)) == expected


def test_unpruned_equals_generate_on_the_padded_batch(model: Any) -> None:
    requests = requests_of_many_sizes(12, seed=1, max_new_tokens=12)
    answers = of_one_batch(model, requests, 12)
    assert_lively(answers)
    assert tokens(engine(model).generate(requests)) == answers


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_pruned_equals_patch_and_generate_alone_and_in_batches(
    model: Any, pruning: Pruning
) -> None:
    requests = requests_of_many_sizes(12, seed=2, max_new_tokens=10)
    patched = patch(copy.deepcopy(model), pruning)
    expected = expected_tokens(patched, PROCESSOR, requests)
    assert_lively(expected)
    late = engine(model, pruning, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    one_by_one = engine(model, pruning)
    alone = itertools.chain.from_iterable(one_by_one.generate([r]) for r in requests)
    assert tokens(alone) == expected
    assert of_one_batch(patched, requests[:8], 10) == {r.id: expected[r.id] for r in requests[:8]}


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_every_image_keeps_what_the_schedule_says_of_its_own_count(
    model: Any, pruning: Pruning
) -> None:
    worker = engine(model, pruning)
    requests = requests_of_many_sizes(8, seed=3, max_new_tokens=4, ignore_eos=True)
    prepared = [worker.prepare(request) for request in requests]
    for item in prepared:
        worker.submit(item)
    worker.step()
    cache, runs = worker._cache, worker._scheduler.running.values()
    held = {task.prepared.id: cache.lengths_of(task.key) for task in runs}
    results = [*worker.step(), *worker.step(), *worker.step()]
    assert len(results) == len(requests) == len(held)
    counts: set[int] = set()
    for item, result in zip(prepared, sorted(results, key=lambda r: r.id), strict=True):
        assert isinstance(item, Prepared)
        stages = [pruning.stages(count, LAYERS) for count in item.image_tokens]
        kept = [sum(stage[1] for stage in at) for at in zip(*stages, strict=True)]
        assert result.visual_tokens_stages == kept
        assert result.visual_tokens == sum(item.image_tokens)
        starts = itertools.accumulate(item.image_tokens, initial=0)
        for start, count, image in zip(starts, item.image_tokens, stages, strict=False):
            for (_, keep), indices in zip(image, result.kept_tokens or [], strict=True):
                assert sum(start <= index < start + count for index in indices) == keep
        layers = [
            tokens_per_layer(count, image, LAYERS)
            for count, image in zip(item.image_tokens, stages, strict=True)
        ]
        text = len(item.input_ids) - sum(item.image_tokens)
        # One token of the answer is stored beside the prompt after the first step.
        present = [text + 1 + sum(image[start] for image in layers) for start, _ in cache.spans]
        assert held[item.id] == tuple(present)
        counts.update(item.image_tokens)
    assert len(counts) > 5


def test_the_memory_plan_is_for_the_largest_image(model: Any) -> None:
    worker = engine(model, Pruning(retention=0.4), sampling=Sampling(max_new_tokens=10))
    plan, room = worker.memory_plan, worker._cache.room
    assert plan.request_bytes == room.bytes_alone(worker._runner.need(88 + TEXT_TOKENS, [88], 10))
    assert plan.request_bytes < plan.request_bytes_unpruned


def test_tiles_that_do_not_fit_the_model_fail_alone(model: Any) -> None:
    """A processor whose grids are others agrees with the model on some images and not on all."""
    other = tiny_processor(patch_size=8, pinpoints=(*PINPOINTS, (96, 96)))
    worker = Engine(model, other, kv_bytes=1 << 26)
    requests = [
        Request(prompt="what", images=(picture(0, size),), id=size)
        for size in ((30, 45), (96, 96), (64, 64))
    ]
    results = by_id(worker.generate(requests))
    assert [size for size, result in results.items() if result.error] == [(96, 96)]
    error = results[(96, 96)].error or ""
    assert error.startswith("mismatch: pixel_values of an image have shape [1, 10, 3, 32, 32]")


def test_the_processor_of_another_family_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="does not fit the model: images without image_sizes"):
        Engine(model, tiny_processor())
    with pytest.raises(UserError, match=r"does not fit the model: .* takes \[1, 3, 32, 32\]"):
        Engine(lively_llava(), PROCESSOR)


def test_a_checkpoint_is_loaded_and_served(model: Any, tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, spread=0.4, **LLAVA_NEXT)
    loaded = Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)
    requests = requests_of_many_sizes(6, seed=4)
    assert tokens(loaded.generate(requests)) == tokens(engine(model).generate(requests))
    images = loaded.prepare._processor.image_processor
    assert type(images).__name__ == "LlavaNextImageProcessorPil"
