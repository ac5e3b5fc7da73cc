"""The engine with each family: as `generate` unpruned, as `patch` and `generate` pruned."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import (
    assert_lively,
    batch_inputs,
    expected_tokens,
    tokens,
)
from tests.every_family.family import (
    LAYERS,
    Family,
    covering,
    requests_of_many_sizes,
)
from trio.engine.engine import Engine
from trio.engine.kv_budget import TEXT_TOKENS
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.families.adapter import Adapter, Inputs
from trio.families.registry import adapter_class
from trio.patching import patch
from trio.pruning.options import Pruning
from trio.pruning.schedule import tokens_per_layer

PRUNINGS = {
    "trio": Pruning(retention=0.4),
    "counts": Pruning(schedule="1:30,4:20", position_ids="keep"),
    "shares-from-embeddings": Pruning(schedule="0:0.5,3:0.2", method="gradient"),
    "random": Pruning(schedule="1:0.4", method="random", seed=3),
    "fastv": Pruning(schedule="2:0.4", method="fastv"),
    "divprune": Pruning(retention=0.4, method="divprune"),
}

# LLaVA's are in tests/engine.
QUICK = {
    "trio": ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"],
    "shares-from-embeddings": ["qwen3_vl"],
    "fastv": ["llava_next"],
}
OF_COUNTS = QUICK | {key: ["llava", "qwen2_5_vl"] for key in ("counts", "random", "divprune")}


def engine(family: Family, pruning: Pruning | None = None, **options: Any) -> Engine:
    return Engine(family.model, family.processor, pruning=pruning, kv_bytes=1 << 26, **options)


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


def test_unpruned_equals_generate(any_family: Family) -> None:
    requests = requests_of_many_sizes(7)
    expected = expected_tokens(any_family.model, any_family.processor, requests)
    assert_lively(expected)
    late = engine(any_family, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    assert tokens(engine(any_family).generate(requests)) == expected


def test_unpruned_equals_generate_on_the_padded_batch(family: Family) -> None:
    requests = requests_of_many_sizes(8, seed=1, max_new_tokens=9)
    answers = of_one_batch(family.model, family.processor, requests, 9)
    assert_lively(answers)
    assert tokens(engine(family).generate(requests)) == answers


@pytest.mark.parametrize(
    ("family", "pruning"), covering(PRUNINGS, QUICK), indirect=["family"], scope="module"
)
def test_pruned_equals_patch_and_generate_alone_and_in_batches(
    family: Family, pruning: Pruning
) -> None:
    processor = family.processor
    requests = requests_of_many_sizes(7, seed=2, max_new_tokens=8)
    patched = patch(copy.deepcopy(family.model), pruning)
    expected = expected_tokens(patched, processor, requests)
    assert_lively(expected)
    late = engine(family, pruning, max_running=5, batch_tokens=250)
    assert tokens(late.generate(requests)) == expected
    one_by_one, some = engine(family, pruning), requests[1::2]
    alone = itertools.chain.from_iterable(one_by_one.generate([r]) for r in some)
    assert tokens(alone) == {r.id: expected[r.id] for r in some}
    assert of_one_batch(patched, processor, requests[:7], 8) == {i: expected[i] for i in range(7)}


@pytest.mark.parametrize(
    ("family", "pruning"), covering(PRUNINGS, OF_COUNTS), indirect=["family"], scope="module"
)
def test_every_image_keeps_what_the_schedule_says_of_its_own_count(
    family: Family, pruning: Pruning
) -> None:
    worker = engine(family, pruning)
    settled = worker._runner.pruning
    requests = requests_of_many_sizes(8, seed=3, max_new_tokens=4, ignore_eos=True)
    prepared = [worker.prepare(request) for request in requests]
    for item in prepared:
        worker.submit(item)
    worker.step()
    cache, runs = worker._cache, worker._scheduler.running.values()
    held = {sequence.prepared.id: cache.lengths_of(sequence.key) for sequence in runs}
    results = [*worker.step(), *worker.step(), *worker.step()]
    assert len(results) == len(requests) == len(held)
    counts: set[int] = set()
    for item, result in zip(prepared, sorted(results, key=lambda r: r.id), strict=True):
        assert isinstance(item, Prepared)
        stages = [settled.stages(count, LAYERS) for count in item.image_tokens]
        kept = [sum(stage[1] for stage in at) for at in zip(*stages, strict=True)]
        assert result.visual_tokens_stages == kept
        assert result.visual_tokens == sum(item.image_tokens)
        starts = itertools.accumulate(item.image_tokens, initial=0)
        for start, count, image in zip(starts, item.image_tokens, stages, strict=False):
            own = range(start, start + count)
            for (_, keep), indices in zip(image, result.kept_tokens or [], strict=True):
                assert sum(index in own for index in indices) == keep
        layers = [
            tokens_per_layer(count, image, LAYERS)
            for count, image in zip(item.image_tokens, stages, strict=True)
        ]
        text = len(item.input_ids) - sum(item.image_tokens)
        # One token of the answer is stored beside the prompt after the first step.
        present = [text + 1 + sum(image[start] for image in layers) for start, _ in cache.spans]
        assert held[item.id] == tuple(present)
        counts.update(item.image_tokens)
    assert len(counts) >= 5 if family.per_image else counts == {family.planned}


def test_the_memory_plan_is_for_the_largest_or_a_usual_image(family: Family) -> None:
    worker = engine(family, Pruning(retention=0.4), sampling=Sampling(max_new_tokens=10))
    plan, visual = worker.memory_plan, family.planned
    need = worker._runner.need(visual + TEXT_TOKENS, [visual], 10)
    assert plan.request_bytes == worker._cache.bytes_of(need)
    assert plan.request_bytes < plan.request_bytes_unpruned


def test_a_checkpoint_is_loaded_and_served(family: Family, tmp_path: Path) -> None:
    directory = family.save(tmp_path)
    loaded = Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)
    requests = requests_of_many_sizes(3, seed=4, max_new_tokens=5)
    assert tokens(loaded.generate(requests)) == tokens(engine(family).generate(requests))
    assert type(loaded.prepare._processor.image_processor).__name__ == family.image_processor


def test_an_adapter_that_counts_wrongly_is_refused(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = adapter_class(family.model.config)
    counted = kind.visual_tokens

    def one_more(self: Adapter, inputs: Inputs) -> list[int]:
        return [count + 1 for count in counted(self, inputs)]

    monkeypatch.setattr(kind, "visual_tokens", one_more)
    with pytest.raises(UserError, match=rf"{kind.__name__}.visual_tokens says \[\d+\] of an image"):
        engine(family)
