"""The engine against `generate` of transformers, and batches against singles."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.engine.support import (
    assert_lively,
    by_id,
    expected_tokens,
    generate,
    lively_llava,
    mixed_requests,
    new_tokens,
    picture,
    same_weights,
    tokens,
)
from tests.tiny.llava import tiny_processor
from trio.engine import kv_cache
from trio.engine import scheduler as shortage
from trio.engine.cuda_graphs import Step, StepGraphs
from trio.engine.engine import Engine
from trio.engine.kv_budget import TEXT_TOKENS
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.errors import UserError
from trio.patching import patch
from trio.pruning.options import Pruning

PROCESSOR = tiny_processor()
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 4},
    "llama-one-kv-head": {"kv_heads": 1, "seed": 3},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
}
TRIO = Pruning(retention=0.4)
PRUNINGS = {
    "trio": TRIO,
    "trio-last-keep": Pruning(schedule="0:30,3:9", proxy_positions="last", position_ids="keep"),
    "trio-as-for-qwen": Pruning(
        schedule="2:30,6:9",
        proxy_layer="previous",
        proxy_head="input_embedding",
        position_ids="keep",
    ),
    "gradient": Pruning(schedule="1:0.5,3:0.2", method="gradient"),
    "random": Pruning(schedule="1:20,4:5", method="random", seed=3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_llava()


def engine(model: Any, pruning: Pruning | None = None, **options: Any) -> Engine:
    return Engine(model, PROCESSOR, pruning=pruning, **{"kv_bytes": 1 << 26, **options})


def singles(engine: Engine, requests: list[Request]) -> dict[Any, Result]:
    return by_id(itertools.chain.from_iterable(engine.generate([r]) for r in requests))


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_unpruned_equals_generate_in_a_batch_that_others_join_late(options: Any) -> None:
    model = lively_llava(**options)
    requests = mixed_requests(10)
    expected = expected_tokens(model, PROCESSOR, requests)
    assert_lively(expected)
    late = engine(model, max_running=5, batch_tokens=150)
    assert tokens(late.generate(requests)) == expected
    assert late.stats()["running_mean"] > 3
    assert tokens(engine(model).generate(requests)) == expected


def test_logprobs_are_those_of_generate(model: Any) -> None:
    requests = mixed_requests(4, seed=2, max_new_tokens=8)
    results = by_id(engine(model).generate(requests))
    for request in requests:
        output = generate(model, PROCESSOR, request, output_logits=True)
        answer = new_tokens(output, PROCESSOR, request)
        logits = torch.cat(output.logits).log_softmax(-1)
        expected = logits[range(len(answer)), answer].tolist()
        assert results[request.id].logprobs == pytest.approx(expected, abs=1e-4)


def test_a_model_is_left_as_it_was(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config.text_config._attn_implementation
    by_id(engine(model, TRIO).generate(mixed_requests(4)))
    assert same_weights(before, model.state_dict())
    assert model.config.text_config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_pruned_equals_patch_and_generate_alone_and_in_batches(
    model: Any, pruning: Pruning
) -> None:
    requests = mixed_requests(8, seed=3)
    expected = expected_tokens(patch(copy.deepcopy(model), pruning), PROCESSOR, requests)
    assert_lively(expected)
    alone = singles(engine(model, pruning), requests)
    assert {key: result.token_ids for key, result in alone.items()} == expected
    late = engine(model, pruning, max_running=5, batch_tokens=150)
    for key, result in by_id(late.generate(requests)).items():
        assert result.token_ids == alone[key].token_ids
        assert result.kept_tokens == alone[key].kept_tokens
        assert result.visual_tokens_stages == alone[key].visual_tokens_stages


class Eager:
    """Steps over as many rows as a recorded one, not recorded."""

    trouble: str | None = None

    def __call__(self, step: Step, rows: int, generation: int) -> torch.Tensor:
        return step(rows)


def as_on_a_gpu(engine: Engine) -> Engine:
    """Steps over rounded numbers of rows, with pages anywhere, that go on before the outcome of the
    last one is known."""
    engine._runner.graphs = Eager()
    engine._runner.lag = 1
    cache = engine._cache
    cache.room.together, cache._apart = False, True
    cache._table_on_device = cache._brought(cache._table)
    return engine


@pytest.mark.parametrize(
    ("pruning", "sampling"),
    [(None, {"ignore_eos": True}), (TRIO, {"temperature": 0.8})],
    ids=["unpruned-ignoring", "trio-drawn"],
)
def test_the_way_a_gpu_goes_leads_to_the_same_answers(
    model: Any, pruning: Pruning | None, sampling: dict[str, Any]
) -> None:
    requests = [
        replace(request, sampling=replace(request.sampling or Sampling(), seed=5))
        for request in mixed_requests(14, seed=6, **sampling)
    ]
    expected = by_id(engine(model, pruning).generate(requests))
    for options in ({}, {"max_running": 5, "batch_tokens": 150}):
        other = as_on_a_gpu(engine(model, pruning, **options))
        got = by_id(other.generate(requests))
        assert got.keys() == expected.keys()
        for key, result in got.items():
            assert result.token_ids == expected[key].token_ids
            assert result.finish_reason == expected[key].finish_reason
            assert result.kv_bytes == expected[key].kv_bytes
            assert result.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)
        assert other._cache.room.holders == other._cache.used_bytes == 0
        assert not other._under_way
        assert other.stats()["output_tokens"] == sum(len(r.token_ids) for r in got.values())


def test_pruning_changes_answers_with_images_and_no_others(model: Any) -> None:
    requests = mixed_requests(16, seed=4, max_new_tokens=10)
    pruned = tokens(engine(model, TRIO).generate(requests))
    whole = tokens(engine(model).generate(requests))
    for request in requests:
        assert (pruned[request.id] != whole[request.id]) <= bool(request.images)
    assert sum(pruned[r.id] != whole[r.id] for r in requests if r.images) > 5


def test_sampled_answers_do_not_depend_on_neighbours(model: Any) -> None:
    own: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 10},
        {"temperature": 1.5, "top_p": 0.8},
    ]
    requests = [
        replace(r, sampling=Sampling(max_new_tokens=8, seed=r.id, **own[r.id % 3]))
        for r in mixed_requests(9, seed=6)
    ]
    alone = singles(engine(model), requests)
    together = tokens(engine(model, max_running=5).generate(reversed(requests)))
    assert together == {key: result.token_ids for key, result in alone.items()}
    assert_lively(together)


def test_the_seed_decides_a_sampled_answer(model: Any) -> None:
    def answers(seeds: list[int | None]) -> list[tuple[int, ...]]:
        sampling = [Sampling(max_new_tokens=12, temperature=1.0, seed=seed) for seed in seeds]
        requests = [Request(prompt="what", id=i, sampling=s) for i, s in enumerate(sampling)]
        table = tokens(engine(model).generate(requests))
        return [tuple(table[i]) for i in range(len(seeds))]

    first, again, other = answers([1, 1, 2])
    assert first == again != other
    assert len(set(answers([None] * 4))) > 1


def test_stop_tokens_end_an_answer_and_stay_out_of_its_text(model: Any) -> None:
    request = Request(prompt="how many digit", images=(picture(1),), id=0)
    long = Sampling(max_new_tokens=12, ignore_eos=True)
    (whole,) = engine(model).generate([replace(request, sampling=long)])
    place = next(i for i, t in enumerate(whole.token_ids) if i > 2 and 5 <= t < 40)
    token = whole.token_ids[place]
    first = whole.token_ids.index(token)
    stop = replace(long, stop_token_ids=(token,))
    (cut,) = engine(model).generate([replace(request, sampling=stop)])
    assert (cut.finish_reason, whole.finish_reason) == ("stop", "length")
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.response == PROCESSOR.tokenizer.decode(
        whole.token_ids[:first], skip_special_tokens=True
    )


def test_the_models_own_end_of_sequence_stops_unless_ignored(model: Any) -> None:
    requests = mixed_requests(20, seed=7, max_new_tokens=30)
    results = by_id(engine(model).generate(requests))
    stopped = [r for r in results.values() if r.finish_reason == "stop"]
    eos = model.generation_config.eos_token_id
    assert stopped
    assert all(r.token_ids.index(eos) == len(r.token_ids) - 1 for r in stopped)
    ignoring = replace(requests[0].sampling or Sampling(), ignore_eos=True)
    key = stopped[0].id
    (longer,) = engine(model).generate([replace(requests[key], sampling=ignoring)])
    assert longer.finish_reason == "length"
    assert longer.token_ids[: len(stopped[0].token_ids)] == stopped[0].token_ids


def test_one_new_token(model: Any) -> None:
    requests = mixed_requests(6, seed=8, max_new_tokens=1)
    worker = engine(model, TRIO)
    results = by_id(worker.generate(requests))
    assert all(r.output_tokens == 1 and r.decode_s == 0 for r in results.values())
    assert worker.stats()["decode_steps"] == 0


def pulled_ahead() -> int:
    """Requests that threads prepare meanwhile."""
    return 2 * min(8, torch.get_num_threads())


def test_results_come_as_they_finish_and_requests_are_pulled_lazily(model: Any) -> None:
    pulled = []

    def requests() -> Any:
        for number in range(60):
            pulled.append(number)
            length = 20 if number == 0 else 3
            sampling = Sampling(max_new_tokens=length, ignore_eos=True)
            yield Request(prompt="what is this", id=number, sampling=sampling)

    order = []
    for result in engine(model, max_running=4).generate(requests()):
        order.append(result.id)
        assert len(pulled) <= len(order) + 8 + pulled_ahead()
    assert sorted(order) == list(range(60))
    assert 10 < order.index(0) < 50


def test_failed_results_come_before_the_rest_is_pulled(model: Any) -> None:
    pulled = []

    def requests() -> Any:
        for number in range(200):
            pulled.append(number)
            yield Request(prompt=None, id=number)  # type: ignore[arg-type]

    order = []
    for result in engine(model, max_running=4).generate(requests()):
        order.append(result.id)
        assert len(pulled) <= len(order) + 4 + pulled_ahead()
    assert order == list(range(200))


def test_an_answer_left_halfway_leaves_nothing_behind(model: Any) -> None:
    worker = engine(model, max_running=4)
    next(worker.generate(mixed_requests(16)))
    assert not worker.has_work
    assert worker._cache.used_bytes == worker._cache.room.holders == 0
    requests = mixed_requests(4)
    assert tokens(worker.generate(requests)) == expected_tokens(model, PROCESSOR, requests)


def test_only_one_generate_at_a_time(model: Any) -> None:
    worker = engine(model, max_running=2)
    first = worker.generate(mixed_requests(8))
    next(first)
    with pytest.raises(UserError, match="other requests"):
        next(worker.generate([Request(prompt="what")]))
    first.close()


def broken_requests() -> dict[str, Request | Prepared]:
    image = picture(0)
    good = engine_prepared(Request(prompt="what", images=(image,)))
    return {
        "prompt: ": Request(prompt=None, id="a"),  # type: ignore[arg-type]
        "image: ": Request(prompt="what", images=("no image",), id="b"),
        "image: image 1 is 1 x 900": Request(
            prompt="what", images=(image, image.resize((1, 900))), id="c"
        ),
        "too_long: 464 prompt tokens": Request(prompt="what " * 462, id="d"),
        "too_long: 4 prompt tokens and up to 600": Request(
            prompt="what is", id="e", sampling=Sampling(max_new_tokens=600)
        ),
        "mismatch: prompt has 66": replace(good, input_ids=(4, 4, *good.input_ids), id="f"),
        "mismatch: image_inputs": replace(good, image_inputs=(), id="g"),
        "mismatch: placeholders": replace(
            good, input_ids=tuple(4 for _ in range(63)), image_tokens=(63,), id="h"
        ),
        "prompt: the prompt has no tokens": Prepared(input_ids=(), id="i"),
        "mismatch: an image without": replace(
            good, image_inputs=good.image_inputs * 2, image_tokens=(64, 0), id="j"
        ),
    }


def engine_prepared(request: Request) -> Prepared:
    prepared = engine(lively_llava()).prepare(request)
    assert isinstance(prepared, Prepared)
    return prepared


def test_what_cannot_be_served_fails_alone(model: Any) -> None:
    broken = broken_requests()
    good = mixed_requests(10, seed=10)
    mixed = [item for pair in itertools.zip_longest(good, broken.values()) for item in pair if item]
    worker = engine(model, TRIO, max_running=4)
    results = by_id(worker.generate(mixed))
    for start, request in broken.items():
        result = results.pop(request.id)
        assert result.finish_reason == "error"
        assert result.error is not None
        assert result.error.startswith(start)
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        given = {name for name, value in values.items() if value not in (None, [])}
        assert given == {"id", "finish_reason", "error"}
    served = tokens(engine(model, TRIO).generate(good))
    assert {key: result.token_ids for key, result in results.items()} == served
    assert worker.stats()["failed"] == len(broken)
    assert worker._cache.room.holders == 0


def test_a_request_without_any_room_fails_and_smaller_ones_run(model: Any) -> None:
    worker = Engine(model, PROCESSOR, kv_bytes=6 * 2 * 2 * 8 * 4 * 128)
    big = Request(prompt="what", images=(picture(1),) * 2, id="big")
    small = Request(prompt="what", id="small")
    results = by_id(worker.generate([big, small]))
    assert (results["big"].error or "").startswith("no_room: 131 prompt tokens and up to 64")
    assert results["small"].error is None
    pruned = Engine(model, PROCESSOR, pruning=Pruning(schedule="0:8"), kv_bytes=6 * 2 * 2 * 8 * 512)
    assert by_id(pruned.generate([big]))["big"].error is None


def test_failures_of_the_engine_are_raised(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = engine(model)

    def broken(*args: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(worker._runner, "decode", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(worker.generate(mixed_requests(3, max_new_tokens=5)))
    monkeypatch.undo()
    assert len(list(worker.generate(mixed_requests(3)))) == 3


@pytest.mark.parametrize("part", ["encode", "prefill", "decode"])
def test_out_of_memory_work_is_done_in_smaller_parts(
    model: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Sampling(max_new_tokens=5, temperature=1.0, seed=7)
    requests = [
        *mixed_requests(9, max_new_tokens=5),
        *(replace(r, id=9 + r.id, sampling=drawn) for r in mixed_requests(3, seed=1)),
    ]
    expected = by_id(engine(model, TRIO).generate(requests))
    worker = engine(model, TRIO)
    work, sizes = getattr(worker._runner, part), []

    def scarce(*given: Any) -> Any:
        sequences = given[0] if given else worker._scheduler.running  # decoding takes all that run
        sizes.append(len(sequences))
        if len(sequences) > 3:
            raise torch.OutOfMemoryError("no memory left")
        return work(*given)

    monkeypatch.setattr(worker._runner, part, scarce)
    results = by_id(worker.generate(requests))
    assert max(sizes) > 3
    assert {k: r.token_ids for k, r in results.items()} == {
        k: r.token_ids for k, r in expected.items()
    }
    assert worker._cache.used_bytes == worker._cache.room.holders == 0
    stats = worker.stats()
    assert stats["out_of_memory"] > 0 and stats["requests"] == len(requests)
    assert stats["images"] == sum(len(request.images) for request in requests)
    for name in ("prompt_tokens", "output_tokens"):
        assert stats[name] == sum(getattr(result, name) for result in results.values())


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_limits_come_back_once_there_is_memory_again(
    model: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortage, "PATIENCE", 1)
    worker = engine(model, max_running=16)
    before, plan = worker.stats(), worker.memory_plan
    work, short = getattr(worker._runner, part), [True]

    def scarce(*given: Any) -> Any:
        if short:
            short.pop()
            raise torch.OutOfMemoryError("no memory left")
        return work(*given)

    monkeypatch.setattr(worker._runner, part, scarce)
    requests = mixed_requests(6, max_new_tokens=3, ignore_eos=True)
    changed = {"prefill": "batch_tokens", "decode": "max_running"}[part]
    worker.submit(requests[0])
    worker.submit(requests[1])
    while worker.has_work and worker.stats()[changed] == before[changed]:
        worker.step()
    stats = worker.stats()
    assert stats["out_of_memory"] == 1 and stats[changed] < before[changed]
    assert worker.memory_plan.max_running == stats["max_running"]
    assert worker.memory_plan.kv_budget_bytes == stats["kv_budget_bytes"]
    while worker.has_work:
        worker.step()
    for _ in range(3):
        for request in requests:
            by_id(worker.generate([request]))
    assert worker.stats()[changed] == before[changed]
    assert worker.memory_plan == plan


@pytest.mark.parametrize("part", ["encode", "prefill", "decode"])
def test_what_needs_more_memory_than_there_is_fails_alone(
    model: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = engine(model)
    work, tries = getattr(worker._runner, part), []

    def scarce(*given: Any) -> Any:
        sequences = given[0] if given else list(worker._scheduler.running.values())
        if any(sequence.prepared.id == 4 for sequence in sequences):
            tries.append(len(sequences))
            raise torch.OutOfMemoryError("no memory left")
        return work(*given)

    monkeypatch.setattr(worker._runner, part, scarce)
    results = by_id(worker.generate(mixed_requests(8, max_new_tokens=5)))
    assert [k for k, r in sorted(results.items()) if r.error] == [4]
    assert results[4].error == "no_room: the device ran out of memory: no memory left"
    assert tries[-2:] == [1, 1]


def test_a_device_with_less_memory_than_the_budget(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, asked = torch.empty, list[Any]()

    def scarce(shape: Any, **options: Any) -> torch.Tensor:
        asked.extend([shape] * isinstance(shape, tuple))
        if 0 < len(asked) < 3:
            raise torch.OutOfMemoryError("no memory left")
        return make(shape, **options)

    monkeypatch.setattr(kv_cache.torch, "empty", scarce)
    worker = engine(model)
    monkeypatch.undo()
    assert worker.stats()["kv_budget_bytes"] == worker._cache.budget < (1 << 26) / 3.9
    assert caplog.messages == ["0.02 GB for keys and values: there is no room for 0.07"]
    requests = mixed_requests(6, max_new_tokens=5)
    assert tokens(worker.generate(requests)) == tokens(engine(model).generate(requests))
    with pytest.raises(UserError, match="no memory for the keys and values of a prompt of 64"):
        engine(model, kv_bytes=30_000)


@pytest.mark.parametrize("pruning", [Pruning(), Pruning(schedule="1:20,3:4")])
def test_the_memory_plan_is_what_the_cache_holds(model: Any, pruning: Pruning) -> None:
    sampling = Sampling(max_new_tokens=10)
    worker = Engine(model, PROCESSOR, pruning=pruning, sampling=sampling, kv_bytes=1_000_000)
    plan, cache = worker.memory_plan, worker._cache
    need = worker._runner.need(64 + TEXT_TOKENS, [64], 10)
    while cache.allocate(len(cache.order), need) is not None:
        pass
    assert 3 < plan.requests == len(cache.order) < plan.max_running
    assert (plan.requests > plan.requests_unpruned) == pruning.active
    assert plan.as_dict()["requests"] == plan.requests


def test_settings_out_of_reach_are_refused_at_the_start(model: Any) -> None:
    with pytest.raises(UserError, match="retention"):
        engine(model, Pruning(retention=0.05))
    with pytest.raises(UserError, match="layers"):
        engine(model, Pruning(schedule="6:10"))
    with pytest.raises(UserError, match="max_running"):
        engine(model, max_running=0)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        (32, 8, "writes 16 placeholder tokens .* gives 64"),
        (16, 4, r"shape \[1, 3, 16, 16\], and the model takes \[1, 3, 32, 32\]"),
    ],
)
def test_a_processor_of_another_model_is_refused_at_the_start(
    model: Any, image_size: int, patch_size: int, message: str
) -> None:
    other = tiny_processor(image_size=image_size, patch_size=patch_size)
    with pytest.raises(UserError, match=message):
        Engine(model, other)


def test_many_mixed_requests_leave_the_cache_empty(model: Any) -> None:
    worker = Engine(model, PROCESSOR, pruning=TRIO, kv_bytes=700_000, batch_tokens=300)
    results = by_id(worker.generate(mixed_requests(30, seed=11)))
    assert sorted(results) == list(range(30))
    assert all(result.error is None for result in results.values())
    stats = worker.stats()
    assert stats["requests"] == 30
    assert 0 < stats["kv_used_bytes_peak"] <= 700_000
    assert worker._cache.allocated_bytes <= 700_000
    assert worker._cache.used_bytes == worker._cache.room.holders == 0


def test_a_closed_engine_gives_its_memory_back_and_serves_no_more(model: Any) -> None:
    requests = mixed_requests(3)
    with engine(model, TRIO) as worker:
        by_id(worker.generate(requests))
        worker.submit(requests[0])
        worker.step()
    worker.close()
    assert worker._cache.allocated_bytes == 0 and not worker.has_work
    assert worker.stats()["requests"] == 3 and worker.memory_plan.requests > 0
    for use in (
        lambda: worker.submit(requests[0]),
        lambda: next(worker.generate(requests)),
        worker.step,
        worker.__enter__,
        lambda: worker.beside([Pruning()]),
    ):
        with pytest.raises(UserError, match="this engine is closed"):
            use()
    assert len(list(engine(model, TRIO).generate(requests))) == 3


def test_an_engine_that_is_dropped_gives_its_memory_back_at_once(model: Any) -> None:
    worker = as_on_a_gpu(engine(model, TRIO))
    worker._runner.graphs = StepGraphs(lambda step, rows: (lambda: None, step(rows)))
    by_id(worker.generate(mixed_requests(3)))
    gone = weakref.ref(worker._cache.pool)
    gc.disable()
    try:
        del worker
        assert gone() is None
    finally:
        gc.enable()


def test_engines_beside_each_other_share_the_memory_and_close_the_first(model: Any) -> None:
    first = engine(model)
    whole = first._cache.allocated_bytes
    made = first.beside([TRIO])
    assert first._cache.allocated_bytes == 0
    parts = [one._cache.allocated_bytes for one in made]
    assert 0.99 * whole < sum(parts) <= whole
    requests = mixed_requests(4)
    assert tokens(made[0].generate(requests)) == tokens(engine(model).generate(requests))
