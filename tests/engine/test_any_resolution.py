"""The engine with models whose images give a number of visual tokens of their own each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from tests.qwen import LARGEST, save_tiny_qwen, tiny_qwen, tiny_qwen_processor
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """model: lively. planned: visual tokens of the image that the memory plan is for.
    save: writes the same model as a checkpoint. images: class of its image processor."""

    model: Any
    processor: Any
    planned: int
    save: Callable[[Path], Path]
    images: str


def llava_next() -> Family:
    return Family(
        model=lively_llava(**LLAVA_NEXT),
        processor=PROCESSOR,
        planned=88,
        save=lambda path: save_tiny_checkpoint(path, spread=0.4, **LLAVA_NEXT),
        images="LlavaNextImageProcessorPil",
    )


def qwen2_5_vl() -> Family:
    return Family(
        model=tiny_qwen(spread=0.4),
        processor=tiny_qwen_processor(),
        planned=LARGEST,
        save=lambda path: save_tiny_qwen(path, spread=0.4),
        images="Qwen2VLImageProcessorPil",
    )


@pytest.fixture(scope="module", params=[llava_next, qwen2_5_vl], ids=lambda make: make.__name__)
def family(request: Any) -> Family:
    return request.param()


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_llava(**LLAVA_NEXT)


def engine(
    model: Any, pruning: Pruning | None = None, processor: Any = PROCESSOR, **options: Any
) -> Engine:
    return Engine(model, processor, pruning=pruning, kv_bytes=1 << 26, **options)


def engine_of(family: Family, pruning: Pruning | None = None, **options: Any) -> Engine:
    return engine(family.model, pruning, family.processor, **options)


def requests_of_many_sizes(count: int, *, seed: int = 0, **sampling: Any) -> list[Request]:
    """Also one with every size, and so with more images than any other."""
    requests = mixed_requests(count, seed=seed, sizes=MANY_SIZES, **sampling)
    album = tuple(picture(n, size) for n, size in enumerate(MANY_SIZES))
    last = Sampling(**{"max_new_tokens": 9, **sampling})
    return [*requests, Request(prompt="how many", images=album, id=count, sampling=last)]


def of_one_batch(
    model: Any, processor: Any, requests: Sequence[Request], new: int
) -> dict[Any, list[int]]:
    """What `generate` answers to all of them as one batch, padded on the left."""
    inputs = batch_inputs(processor, requests)
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


@pytest.mark.parametrize("seed", [0, 5])
def test_unpruned_qwen_equals_generate(seed: int) -> None:
    family = qwen2_5_vl()
    requests = requests_of_many_sizes(16, seed=seed)
    expected = expected_tokens(family.model, family.processor, requests)
    assert_lively(expected)
    late = engine_of(family, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    assert tokens(engine_of(family).generate(requests)) == expected


def test_unpruned_equals_generate_on_the_padded_batch(family: Family) -> None:
    requests = requests_of_many_sizes(12, seed=1, max_new_tokens=12)
    answers = of_one_batch(family.model, family.processor, requests, 12)
    assert_lively(answers)
    assert tokens(engine_of(family).generate(requests)) == answers


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_pruned_equals_patch_and_generate_alone_and_in_batches(
    family: Family, pruning: Pruning
) -> None:
    processor = family.processor
    requests = requests_of_many_sizes(12, seed=2, max_new_tokens=10)
    patched = patch(copy.deepcopy(family.model), pruning)
    expected = expected_tokens(patched, processor, requests)
    assert_lively(expected)
    late = engine_of(family, pruning, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    one_by_one = engine_of(family, pruning)
    alone = itertools.chain.from_iterable(one_by_one.generate([r]) for r in requests)
    assert tokens(alone) == expected
    some = requests[:8]
    assert of_one_batch(patched, processor, some, 10) == {r.id: expected[r.id] for r in some}


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_every_image_keeps_what_the_schedule_says_of_its_own_count(
    family: Family, pruning: Pruning
) -> None:
    worker = engine_of(family, pruning)
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


def test_the_memory_plan_is_for_the_largest_or_a_usual_image(family: Family) -> None:
    worker = engine_of(family, Pruning(retention=0.4), sampling=Sampling(max_new_tokens=10))
    plan, room, visual = worker.memory_plan, worker._cache.room, family.planned
    need = worker._runner.need(visual + TEXT_TOKENS, [visual], 10)
    assert plan.request_bytes == room.bytes_alone(need)
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


def test_a_checkpoint_is_loaded_and_served(family: Family, tmp_path: Path) -> None:
    directory = family.save(tmp_path)
    loaded = Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)
    requests = requests_of_many_sizes(6, seed=4)
    assert tokens(loaded.generate(requests)) == tokens(engine_of(family).generate(requests))
    assert type(loaded.prepare._processor.image_processor).__name__ == family.images


def test_a_users_words_never_stand_for_images_or_videos() -> None:
    """Spelt out, the names of control tokens are text, and no video gets in."""
    family = qwen2_5_vl()
    prompt = "what <|video_pad|> is <|image_pad|> <|vision_start|>"
    prepared = engine_of(family).prepare(Request(prompt=prompt, images=(picture(0, (64, 64)),)))
    assert isinstance(prepared, Prepared)
    config = family.model.config
    assert prepared.input_ids.count(config.video_token_id) == 0
    assert prepared.input_ids.count(config.image_token_id) == 64
    assert prepared.input_ids.count(config.vision_start_token_id) == 1


def test_the_processor_of_a_llava_is_refused_by_qwen() -> None:
    with pytest.raises(UserError, match="does not fit the model: images without image_grid_thw"):
        Engine(qwen2_5_vl().model, PROCESSOR)
