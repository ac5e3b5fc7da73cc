"""Features that several engines share, and first distributions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.engine.support import lively_llava, mixed_requests
from tests.tiny.llava import tiny_processor
from trio.benchmark.speed.encoding_speed import EncodedOnce
from trio.engine.engine import Engine
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Result, Sampling
from trio.families.adapter import Features, Inputs
from trio.families.registry import adapt
from trio.pruning.options import Pruning

MODEL = lively_llava()
PROCESSOR = tiny_processor()


def prepared() -> list[Prepared]:
    """Requests in pairs about the same images."""
    prepare = Preprocessor(PROCESSOR, type(adapt(MODEL)))
    requests = [prepare(request) for request in mixed_requests(8)]
    ready = [request for request in requests if isinstance(request, Prepared)]
    again = [replace(one, id=one.id + 100) for one in ready]
    return [one for pair in zip(ready, again, strict=True) for one in pair]


REQUESTS = prepared()


def answers(**options: Any) -> dict[Any, Result]:
    engine = Engine(MODEL, PROCESSOR, pruning=Pruning(retention=0.4), **options)
    return {result.id: result for result in engine.generate(REQUESTS)}


def test_shared_features_give_the_same_answers(monkeypatch: Any) -> None:
    adapter = adapt(MODEL)
    shared = EncodedOnce(adapter, hold=True)
    passed: list[int] = []
    encode = adapter.encode_images

    def counting(inputs: Sequence[Inputs], *settings: Any) -> list[Features]:
        passed.append(len(inputs))
        return encode(inputs, *settings)

    monkeypatch.setattr(adapter, "encode_images", counting)
    separate = answers()
    for _ in range(2):
        together = answers(encoder=shared)
        assert {key: one.token_ids for key, one in together.items()} == {
            key: one.token_ids for key, one in separate.items()
        }
    images = {id(image) for one in REQUESTS for image in one.image_inputs}
    assert sum(passed) == len(images)
    shared.forget()
    answers(encoder=shared)
    assert sum(passed) == 2 * len(images)


def test_fill_encodes_what_is_read_later() -> None:
    adapter = adapt(MODEL)
    shared = EncodedOnce(adapter, hold=True)
    images = [image for one in REQUESTS[::2] for image in one.image_inputs]
    seconds, reducing = shared.fill(images, "none", [64] * len(images))
    assert seconds > 0 == reducing
    for image, (expected,) in zip(
        images, (adapter.encode_images([image]) for image in images), strict=True
    ):
        (found,) = shared([image])
        torch.testing.assert_close(found.tokens, expected.tokens)
        assert shared([image], "none", [3])[0] is found
    seconds, reducing = shared.fill(images, "scan", [20] * len(images))
    assert 0 <= reducing < seconds
    assert {len(found) for found in shared(images, "scan", [20] * len(images))} == {20}


def test_first_distributions_are_given_where_asked_for() -> None:
    asked = replace(REQUESTS[0], sampling=Sampling(max_new_tokens=3, first_logprobs=True))
    plain = replace(asked, id="plain", sampling=Sampling(max_new_tokens=3))
    engine = Engine(MODEL, PROCESSOR)
    found = {result.id: result for result in engine.generate([asked, plain])}
    logprobs = found[asked.id].first_logprobs
    assert found["plain"].first_logprobs is None and logprobs is not None
    assert logprobs.shape == (MODEL.config.text_config.vocab_size,)
    assert logprobs.dtype == torch.float32
    assert abs(float(logprobs.exp().sum()) - 1) < 1e-5
    assert int(logprobs.argmax()) == found[asked.id].token_ids[0]
    assert abs(float(logprobs.max()) - found[asked.id].logprobs[0]) < 1e-5
