"""A checkpoint's decoding rules: the engine against `generate` with the same generation config."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.engine.support import (
    by_id,
    lively_llava,
    mixed_requests,
    model_inputs,
    tokens,
)
from tests.engine.test_engine import as_on_a_gpu, singles
from tests.every_family.family import FAMILIES
from tests.tiny.llava import save_tiny_checkpoint, tiny_processor
from trio.engine.decoding.generation_rules import RULES, Rules
from trio.engine.decoding.logits_rules import _MAKERS, follow
from trio.engine.decoding.sampler import distribution
from trio.engine.engine import Engine
from trio.engine.request import Request, Sampling
from trio.errors import UserError
from trio.pruning.options import Pruning

PROCESSOR = tiny_processor()
EOS = 2
EACH: dict[str, Any] = {
    "sequence_bias": [[[20, 25], 9.0], [[30], -4.0], [[40], 3.0]],
    "encoder_repetition_penalty": 1.4,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[20], [30], [40, 41], [EOS]],
    "min_length": 95,
    "min_new_tokens": 9,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": EOS,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.3],
    "suppress_tokens": [20, 25, 35, 45],
    "begin_suppress_tokens": list(range(10, 60)),
}
assert list(EACH) == list(RULES), "a rule without a test"


def with_rules(rules: dict[str, Any], **options: Any) -> Any:
    model = lively_llava(**options)
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    return model


def generated(model: Any, requests: list[Request], processor: Any = PROCESSOR) -> dict[Any, Any]:
    """What `generate` answers, with all that the model's generation config says."""
    out = {}
    for request in requests:
        assert request.sampling is not None
        inputs = model_inputs(processor, request)
        output = model.generate(**inputs, max_new_tokens=request.sampling.max_new_tokens)
        out[request.id] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return out


def engine(model: Any, **options: Any) -> Engine:
    return Engine(model, PROCESSOR, kv_bytes=1 << 26, **options)


@pytest.fixture(scope="module")
def answered() -> tuple[list[Request], dict[Any, Any]]:
    """Requests, and what `generate` answers without rules."""
    requests = mixed_requests(7, seed=4, max_new_tokens=10)
    return requests, generated(lively_llava(), requests)


TOGETHER = {name: EACH[name] for name in EACH if name != "min_length"}
AT_ONCE: dict[str, Any] = {"min_new_tokens": 5, "sequence_bias": [[[EOS], 50.0]]}
"""The end comes as soon as it may."""


@pytest.mark.parametrize(
    "rules",
    [*({name: value} for name, value in EACH.items()), TOGETHER, AT_ONCE],
    ids=[*EACH, "together", "the end at once"],
)
def test_rules_of_a_checkpoint_act_as_in_generate(
    rules: dict[str, Any], answered: tuple[list[Request], dict[Any, Any]]
) -> None:
    model, (requests, plain) = with_rules(rules), answered
    expected = generated(model, requests)
    assert len({*map(tuple, expected.values())}) > 4, "answers that are alike would always agree"
    if not {*rules} <= {"forced_bos_token_id", "remove_invalid_values"}:  # no prompt is that short
        assert expected != plain
    late = engine(model, max_running=5, batch_tokens=150)
    assert tokens(late.generate(requests)) == expected
    if len(rules) > 1:
        assert tokens(as_on_a_gpu(engine(model)).generate(requests)) == expected


def test_makers_stand_in_the_order_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = {"top_h": 0.9, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9}
    cuts |= {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01}
    every = EACH | cuts
    model = with_rules(every | {"do_sample": True, "temperature": 0.7})
    seen: list[Any] = []

    def watched(*args: Any, logits_processor: Any, **kwargs: Any) -> Any:
        seen.extend(type(one) for one in logits_processor)
        raise InterruptedError

    monkeypatch.setattr(type(model), "_sample", watched)
    with pytest.raises(InterruptedError):
        generated(model, mixed_requests(1))
    rules = replace(Rules.of(model), values=every)
    sampling = Sampling(temperature=0.7)
    _, found = follow(rules, sampling, [1, 2], eos=frozenset([EOS]), device=torch.device("cpu"))
    assert found is not None
    assert [type(one) for one in found.processors] == seen
    assert len(seen) == len(_MAKERS)


@pytest.mark.parametrize(("pruning", "gpu_way"), [(None, True), (Pruning(retention=0.4), False)])
def test_rows_with_and_without_rules_share_a_batch(pruning: Pruning | None, gpu_way: bool) -> None:
    own: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.5, "temperature": 0.8, "seed": 3, "min_p": 0.05},
        {"repetition_penalty": 1.3, "ignore_eos": True},
    ]
    requests = [
        replace(r, sampling=Sampling(max_new_tokens=3 + r.id, **own[r.id % 5]))
        for r in mixed_requests(10, seed=9)
    ]
    worker = engine(lively_llava(), pruning=pruning)
    alone = singles(worker, requests)
    together = by_id((as_on_a_gpu(worker) if gpu_way else worker).generate(requests))
    assert {k: r.token_ids for k, r in together.items()} == {
        k: r.token_ids for k, r in alone.items()
    }


def test_a_samplings_own_setting_wins_over_the_checkpoints() -> None:
    model = with_rules({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2})
    requests = mixed_requests(5, seed=5, max_new_tokens=12)
    off = Sampling(max_new_tokens=12, repetition_penalty=1.0, no_repeat_ngram_size=0)
    plain = [replace(request, sampling=off) for request in requests]
    assert tokens(engine(model).generate(plain)) == generated(lively_llava(), requests)
    by_default = Sampling(max_new_tokens=12, repetition_penalty=1.7)
    served = engine(model, sampling=by_default).generate([replace(r, sampling=None) for r in plain])
    expected = generated(
        with_rules({"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}), requests
    )
    assert tokens(served) == expected


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_request_that_starts_over_forgets_its_tokens(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_rules({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2})
    requests = mixed_requests(9, max_new_tokens=8)
    worker = engine(model)
    work, calls = getattr(worker._runner, part), []

    def scarce(*given: Any) -> Any:
        calls.append(len(worker._scheduler.running))
        if len(calls) in (1, 4):
            raise torch.OutOfMemoryError("no memory left")
        return work(*given)

    monkeypatch.setattr(worker._runner, part, scarce)
    assert tokens(worker.generate(requests)) == generated(model, requests)
    assert len(calls) > 4


def test_logprobs_are_the_models_own_whatever_the_rules() -> None:
    model = with_rules({"repetition_penalty": 1.5})
    (request,) = mixed_requests(1, seed=2, max_new_tokens=10)
    (result,) = engine(model).generate([request])
    output = model.generate(
        **model_inputs(PROCESSOR, request),
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_logits=True,
    )
    raw = torch.cat(output.logits).log_softmax(-1)
    expected = raw[range(len(result.token_ids)), result.token_ids].tolist()
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"typical_p": 0.7},
        {"top_h": 0.5, "top_k": 20},
        {"epsilon_cutoff": 0.02, "top_p": 0.95},
        {"eta_cutoff": 0.05},
        {"top_k": 9, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_draws_are_from_what_generate_would_draw_from(cuts: dict[str, Any]) -> None:
    """The probabilities of a second token, of the file's cuts at the sampling's temperature."""
    model = with_rules(cuts)
    (request,) = mixed_requests(1, seed=2)
    inputs = model_inputs(PROCESSOR, request)
    prompt = inputs["input_ids"]
    logits_BV = torch.randn(1, 100, generator=torch.Generator().manual_seed(1)) * 3
    config = GenerationConfig(**{"top_k": 0, **cuts}, do_sample=True, temperature=0.6)
    config._eos_token_tensor = torch.tensor([EOS])
    theirs = model._get_logits_processor(config, input_ids_seq_length=prompt.shape[1], device="cpu")
    grown = torch.cat([prompt, torch.tensor([[30]])], dim=1)
    expected = theirs(grown, logits_BV).softmax(-1)
    sampling, found = follow(
        Rules.of(model),
        Sampling(temperature=0.6),
        prompt[0].tolist(),
        eos=frozenset([EOS]),
        device=torch.device("cpu"),
    )
    scores_BV = logits_BV if found is None else found.processors(grown, logits_BV)
    torch.testing.assert_close(distribution(scores_BV, [sampling]), expected)


def test_a_checkpoint_that_samples_is_answered_greedily_until_a_temperature_is_given() -> None:
    model = with_rules({"do_sample": True, "temperature": 0.7, "top_k": 1, "top_p": 0.5})
    requests = mixed_requests(6, seed=3, max_new_tokens=9)
    greedy = tokens(engine(model).generate(requests))
    assert greedy == generated(lively_llava(), requests)

    def drawn(**more: Any) -> dict[Any, list[int]]:
        sampling = Sampling(max_new_tokens=9, temperature=5.0, seed=1, **more)
        return tokens(engine(model).generate([replace(r, sampling=sampling) for r in requests]))

    assert drawn() == greedy  # of one likeliest token
    assert drawn(top_k=0) != greedy  # of half the probability, as the file says still
    assert drawn(top_k=0, top_p=1.0) != drawn(top_k=0)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_rules_come_from_disk_for_every_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]()
    directory = family.save(tmp_path / name)
    path = directory / "generation_config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    eos = family.model.generation_config.eos_token_id
    rules = {"repetition_penalty": 1.2, "min_new_tokens": 5, "suppress_tokens": [20, 30]}
    path.write_text(json.dumps(said | rules | {"eos_token_id": eos, "do_sample": True}))
    requests = mixed_requests(6, seed=1, max_new_tokens=9)
    worker = Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)
    for key, value in (rules | {"eos_token_id": eos}).items():
        setattr(family.model.generation_config, key, value)
    expected = generated(family.model, requests, family.processor)
    assert tokens(worker.generate(requests)) == expected


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({}, None),
        ({"num_beams": 1, "guidance_scale": 1.0, "max_new_tokens": None}, None),
        ({"num_beams": 3, "length_penalty": 0.5}, "num_beams 3; length_penalty 0.5"),
        ({"do_sample": True, "temperature": 0.7}, "do_sample with temperature 0.7 (answers are gr"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
        ({"max_new_tokens": 3}, "max_new_tokens 3 (an answer's length is"),
        ({"stop_strings": ["x"]}, "stop_strings ['x']"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_what_is_not_followed_is_named_in_one_line_on_loading(
    said: dict[str, Any],
    named: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = save_tiny_checkpoint(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS} | said))
    with caplog.at_level(logging.WARNING, logger="trio"):
        worker = Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("trio.")]
    told = [] if named is None else [f"generation_config.json: not followed: {named}"]
    assert len(lines) == len(told) and all(map(str.startswith, lines, told))
    assert worker.decoding.notice == (lines[0] if lines else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0.0),
        ("no_repeat_ngram_size", -1),
        ("bad_words_ids", [[10_000]]),
        ("bad_words_ids", [5]),
        ("exponential_decay_length_penalty", 3),
        ("typical_p", -0.5),
        ("min_new_tokens", "x"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_on_loading(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^generation_config.json: {name} .*correct it"):
        engine(with_rules({name: value}))


def test_the_bundled_model_has_nothing_to_say() -> None:
    path = Path(__file__).parents[2] / "trio" / "demo" / "model" / "generation_config.json"
    rules = Rules.read(json.loads(path.read_text()))
    assert (dict(rules.values), rules.notice) == ({}, None)
    assert rules.describe(Sampling()) == "greedy"
