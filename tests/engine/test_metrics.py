"""Statistics of results and engine, against what is counted in another way."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.engine.support import by_id, generate, lively_llava, mixed_requests, picture
from tests.tiny.llava import tiny_processor
from trio.decoder.cache_argument import cache_of
from trio.engine.engine import Engine
from trio.engine.metrics import choosing_flops
from trio.engine.request import Prepared, Request, Sampling
from trio.families.registry import adapt
from trio.pruning.options import Pruning

PROCESSOR = tiny_processor()
LAYERS, HIDDEN, KV_HEADS, HEAD_DIM = 6, 32, 2, 8


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_llava(layers=LAYERS, hidden=HIDDEN, kv_heads=KV_HEADS)


def test_kv_bytes_unpruned_are_those_of_the_cache_of_generate(model: Any) -> None:
    requests = mixed_requests(5, seed=1)
    results = by_id(Engine(model, PROCESSOR).generate(requests))
    for request in requests:
        cache = cache_of(generate(model, PROCESSOR, request))
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert results[request.id].kv_bytes == stored
        assert results[request.id].kv_bytes_unpruned == stored


def test_figures_of_a_pruned_request(model: Any) -> None:
    # 4 words, 64 visual tokens; layers 0-1 see 64 of them, layers 2-3 see 20, layers 4-5 see 6.
    request = Request(
        prompt="what is",
        images=(picture(1),),
        id="a",
        sampling=Sampling(max_new_tokens=5, ignore_eos=True),
    )
    engine = Engine(model, PROCESSOR, pruning=Pruning(schedule="2:20,4:6"))
    began = time.perf_counter()
    (result,) = engine.generate([request])
    wall = time.perf_counter() - began
    assert (result.prompt_tokens, result.output_tokens, result.num_images) == (68, 5, 1)
    assert (result.visual_tokens, result.visual_tokens_encoder) == (64, 64)
    assert result.visual_tokens_stages == [20, 6]
    assert result.retention == pytest.approx((64 + 20 + 6) / 3 / 64)
    assert result.kept_tokens is not None
    assert [len(stage) for stage in result.kept_tokens] == [20, 6]
    assert set(result.kept_tokens[1]) < set(result.kept_tokens[0]) < set(range(64))
    # Four of the five new tokens were fed back.
    per_token = 2 * KV_HEADS * HEAD_DIM * 4
    assert result.kv_bytes == 2 * (72 + 28 + 14) * per_token
    assert result.kv_bytes_unpruned == LAYERS * 72 * per_token

    def flops(tokens: int) -> int:
        projections = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM
        ffn = 3 * HIDDEN * 2 * HIDDEN
        return tokens * (projections + ffn) + 2 * tokens**2 * HIDDEN

    assert result.prefill_flops == 2 * (flops(68) + flops(24) + flops(10))
    assert result.prefill_flops_unpruned == LAYERS * flops(68)
    adapter, prepared = adapt(model), engine.prepare(request)
    assert isinstance(prepared, Prepared)
    vision = adapter.vision_flops(prepared.image_inputs[0])
    choosing = choosing_flops(adapter.shape(), Pruning(schedule="2:20,4:6"), (64,), 4)
    assert result.reading_flops == result.prefill_flops + vision + choosing
    assert result.reading_flops_unpruned == result.prefill_flops_unpruned + vision
    assert vision > 0 and choosing > 0
    assert result.prefill_s is not None
    assert result.decode_s is not None
    assert result.latency_s is not None
    assert 0 < result.prefill_s + result.decode_s <= result.latency_s <= wall
    assert result.logprob_mean == pytest.approx(sum(result.logprobs) / 5)


def test_a_request_without_images(model: Any) -> None:
    request = Request(prompt="what is this", sampling=Sampling(max_new_tokens=2, ignore_eos=True))
    (result,) = Engine(model, PROCESSOR, pruning=Pruning(retention=0.5)).generate([request])
    assert (result.num_images, result.visual_tokens, result.visual_tokens_stages) == (0, 0, [])
    assert result.retention is None
    assert result.prefill_flops == result.prefill_flops_unpruned
    assert result.kv_bytes == result.kv_bytes_unpruned


def test_counters_add_up_and_can_be_reset(model: Any) -> None:
    requests = mixed_requests(10, seed=2)
    engine = Engine(model, PROCESSOR, pruning=Pruning(retention=0.5), max_running=4)
    began = time.perf_counter()
    results = list(engine.generate(requests))
    wall = time.perf_counter() - began
    began = time.perf_counter()
    stats = engine.stats(reset=True)
    assert stats["requests"] == 10
    assert stats["images"] == sum(len(request.images) for request in requests)
    assert stats["prompt_tokens"] == sum(r.prompt_tokens or 0 for r in results)
    assert stats["output_tokens"] == sum(r.output_tokens or 0 for r in results)
    assert stats["encode_s"] + stats["prefill_s"] == pytest.approx(
        sum(r.prefill_s or 0 for r in results)
    )
    assert stats["decode_s"] == pytest.approx(sum(r.decode_s or 0 for r in results))
    assert 0 < stats["prune_s"] < stats["prefill_s"]
    assert stats["encode_s"] + stats["prefill_s"] + stats["decode_s"] < wall
    assert 1 < stats["running_mean"] <= 4
    assert stats["device_bytes_peak"] is None
    assert max(r.kv_bytes or 0 for r in results) <= stats["kv_used_bytes_peak"]
    after = engine.stats()
    assert after.pop("running_mean") is None
    assert after.pop("idle_s") < time.perf_counter() - began
    now = {name: after.pop(name) for name in ("max_running", "batch_tokens", "kv_budget_bytes")}
    assert now == {name: stats[name] for name in now} and now["max_running"] == 4
    assert not any(after.values())


def test_time_without_work_counts_as_idle(model: Any) -> None:
    engine = Engine(model, PROCESSOR)
    requests = mixed_requests(2)
    list(engine.generate(requests))
    engine.stats(reset=True)
    time.sleep(0.05)
    engine.submit(requests[0])
    engine.step()
    idle = engine.stats()["idle_s"]
    assert idle >= 0.05
    time.sleep(0.5)
    while engine.has_work:
        engine.step()
    assert engine.stats()["idle_s"] < idle + 0.45


def test_idle_time_goes_to_the_counters_of_its_time(model: Any) -> None:
    engine = Engine(model, PROCESSOR)
    time.sleep(0.5)
    assert engine.stats(reset=True)["idle_s"] >= 0.5
    assert engine.stats()["idle_s"] < 0.45
    next(engine.generate(mixed_requests(4)))
    engine.stats(reset=True)
    time.sleep(0.1)
    assert engine.stats()["idle_s"] >= 0.1
