"""Numbers that are not finite: the request that has them fails, others get what they get alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import by_id, lively_llava, mixed_requests, model_inputs, picture
from tests.engine.test_engine import as_on_a_gpu
from tests.tiny.llava import tiny_processor
from trio.engine.decoding.teacher_forcing import Answer, Answers
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.errors import UserError
from trio.families.adapter import Features
from trio.patching import patch
from trio.pruning.options import Pruning

PROCESSOR = tiny_processor()
PRUNINGS = {
    "unpruned": None,
    "trio": Pruning(retention=0.4),
    "divprune": Pruning(schedule="0:6", method="divprune"),
    "visionzip": Pruning(retention=0.3, encoder="visionzip"),
    "scan": Pruning(retention=0.3, encoder="scan"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_llava()


def requests(**sampling: Any) -> list[Request]:
    """The one with id 5 is the one to be spoilt."""
    made = mixed_requests(8, seed=9, **{"max_new_tokens": 5, "ignore_eos": True, **sampling})
    made[5] = replace(made[5], images=(picture(77),))
    seeded = [replace(r.sampling or Sampling(), seed=r.id) for r in made]
    return [replace(r, sampling=own) for r, own in zip(made, seeded, strict=True)]


def spoiling(worker: Engine, wrong: float, tokens: slice) -> Engine:
    """Features of the marked image get numbers that are none."""
    adapter = worker._runner.adapter
    encode = adapter.encode_images
    marked = worker.prepare(Request(prompt="", images=(picture(77),)), uint8=True)
    assert isinstance(marked, Prepared)
    pixels = marked.image_inputs[0]["pixel_values"]

    def encoded(inputs: Any, *rest: Any) -> list[Features]:
        made = encode(inputs, *rest)
        for one, features in zip(inputs, made, strict=True):
            if torch.equal(one["pixel_values"], pixels):
                features.tokens[tokens] = wrong
        return list(made)

    adapter.encode_images = encoded  # type: ignore[method-assign, assignment]
    return worker


def engine(model: Any, pruning: Pruning | None, *, gpu_way: bool = False, **options: Any) -> Engine:
    worker = Engine(model, PROCESSOR, pruning=pruning, kv_bytes=1 << 26, **options)
    return as_on_a_gpu(worker) if gpu_way else worker


def check(worker: Engine, expected: dict[Any, Result], asked: list[Request], where: str) -> None:
    """Twice: what the first left behind must not spoil the second."""
    for _ in range(2):
        results = by_id(worker.generate(asked))
        bad = results.pop(5)
        assert bad.finish_reason == "error" and bad.response is None
        assert (bad.error or "").startswith(
            f"numeric: NaN or infinity {where}, computed in float32"
        )
        assert bad.logprob_mean is None and bad.first_logprobs is None
        assert (bad.prompt_tokens, bad.visual_tokens) == (expected[5].prompt_tokens, 64)
        for key, result in results.items():
            assert result.token_ids == expected[key].token_ids
            assert result.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)
        assert worker._cache.used_bytes == worker._cache.room.holders == 0


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_features_of_one_image(model: Any, pruning: Pruning | None) -> None:
    few: dict[str, Any] = {"gpu_way": True, "max_running": 4, "batch_tokens": 200}
    for wrong, temperature, options in ((math.nan, 0.0, dict[str, Any]()), (math.inf, 1.0, few)):
        asked = requests(temperature=temperature, max_new_tokens=3)
        expected = by_id(engine(model, pruning).generate(asked))
        worker = spoiling(engine(model, pruning, **options), wrong, slice(2, 3))
        check(worker, expected, asked, "in prefill")


@pytest.mark.parametrize(
    ("wrong", "gpu_way", "temperature"),
    [(math.nan, False, 0), (math.nan, True, 1), (math.inf, True, 0), (-math.inf, False, 1)],
)
def test_a_later_step(model: Any, wrong: float, gpu_way: bool, temperature: float) -> None:
    asked = requests(temperature=temperature)
    expected = by_id(engine(model, PRUNINGS["trio"]).generate(asked))
    worker = engine(model, PRUNINGS["trio"], gpu_way=gpu_way, max_running=4)
    decode, steps = worker._runner.decode, dict.fromkeys(range(10), 0)

    def damaged() -> torch.Tensor:
        running = worker._scheduler.running
        for slot, key in enumerate(worker._cache.order):
            steps[running[key].prepared.id] += 1
            if running[key].prepared.id == 5 and steps[5] % 100 == 3:
                worker._cache.pool[:, worker._cache._table[4, slot]] = wrong
        logits_BV = decode()
        if not any(sequence.prepared.id == 5 for sequence in running.values()):
            steps[5] = 0
        return logits_BV

    worker._runner.decode = damaged  # type: ignore[method-assign]
    check(worker, expected, asked, "in decode step 3")


@pytest.mark.parametrize("kind", ["weights", "proxy-head"])
def test_weights(kind: str) -> None:
    """A token that nobody writes has no part in the answers, but in the saliency."""
    broken = lively_llava()
    pruning = None
    with torch.no_grad():
        if kind == "weights":
            broken.model.language_model.layers[3].mlp.up_proj.weight.mul_(math.nan)
        else:
            pruning = Pruning(retention=0.4, proxy_head="input_embedding")
            broken.model.language_model.embed_tokens.weight[79] = math.nan
    results = by_id(engine(broken, pruning).generate(requests()))
    for request in requests():
        failed = kind == "weights" or bool(request.images)
        assert ((results[request.id].error or "").startswith("numeric: ")) == failed


def test_led_along_answers_fail_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = engine(model, None).prepare
    prompts = [made for made in map(prepare, requests()) if isinstance(made, Prepared)]
    answers = Answers(model, PROCESSOR, max_new_tokens=4)
    expected = dict(answers(PRUNINGS["trio"] or Pruning(), prompts))
    answers._features[5][0].tokens[3] = math.nan
    got = dict(answers(PRUNINGS["trio"] or Pruning(), prompts))
    bad = got.pop(5)
    assert isinstance(bad, Result) and (bad.error or "").startswith(
        "numeric: NaN or infinity in pr"
    )
    for key, answer in got.items():
        before = expected[key]
        assert isinstance(answer, Answer) and isinstance(before, Answer)
        assert answer.token_ids == before.token_ids


def test_a_patched_model_says_which_row(model: Any) -> None:
    broken = copy.deepcopy(model)
    project: Callable[..., torch.Tensor] = broken.model.multi_modal_projector.forward
    broken.model.multi_modal_projector.forward = lambda x: project(x) * math.nan
    patched = patch(broken, Pruning(schedule="0:6", method="random"))
    inputs = model_inputs(PROCESSOR, Request(prompt="what", images=(picture(1),)))
    with pytest.raises(UserError, match=r"row 0 of the batch .* not finite"):
        patched.generate(**inputs, max_new_tokens=2, do_sample=False)
