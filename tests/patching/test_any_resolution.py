"""A patched LLaVA-NeXT: the images of a batch differ in their number of visual tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import trio
from tests.engine.support import MANY_SIZES, batch_inputs, picture
from tests.models import LLAVA_NEXT, PINPOINTS, tiny_llava, tiny_processor
from tests.patching.prompts import run
from trio.engine.request import Request
from trio.errors import UserError

PRUNING = trio.Pruning(retention=0.4)
IMAGES = (1, 2, 0, 1, 3, 1, 0, 1)
"""Of each row."""


@pytest.fixture
def model() -> Any:
    return tiny_llava(**LLAVA_NEXT)


def requests() -> list[Request]:
    pictures = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
    prompts = ["what is this", "how many", "describe the picture please", "where is red ?"] * 2
    rows = []
    for count, prompt in zip(IMAGES, prompts, strict=True):
        rows.append(Request(prompt=prompt, images=tuple(pictures[:count])))
        del pictures[:count]
    assert not pictures
    return rows


def batch(rows: list[Request], side: str = "left") -> dict[str, Any]:
    processor = tiny_processor(patch_size=8, pinpoints=PINPOINTS)
    processor.tokenizer.padding_side = side
    return dict(batch_inputs(processor, rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_many_sizes_equals_singles(model: Any, side: str) -> None:
    unpruned = [run(model, batch([request]))[1] for request in requests()]
    trio.patch(model, PRUNING)
    new, logits, cache = run(model, batch(requests(), side))
    for index, request in enumerate(requests()):
        alone = run(model, batch([request]))
        assert torch.equal(new[index, None], alone[0])
        torch.testing.assert_close(logits[index, None], alone[1], atol=2e-5, rtol=1e-4)
        for together, single in zip(cache.layers, alone[2].layers, strict=True):
            if IMAGES[index]:
                assert together.lengths_B[index] == single.lengths_B[0]
        pruned = not torch.allclose(alone[1], unpruned[index], atol=1e-3)
        assert pruned == bool(IMAGES[index])


def test_a_call_of_the_model_itself_prunes_as_generate_does(model: Any) -> None:
    """`generate` encodes images before it calls the model; here the model gets them as pixels."""
    inputs = batch(requests())
    trio.patch(model, PRUNING)
    _, logits, cache = run(model, inputs, max_new_tokens=1)
    out = model(**inputs, logits_to_keep=1)
    torch.testing.assert_close(out.logits[:, 0], logits[:, 0])
    for one, other in zip(out.past_key_values.layers, cache.layers, strict=True):
        assert torch.equal(one.lengths_B, other.lengths_B)
    del inputs["image_sizes"]
    with pytest.raises(UserError, match="without image_sizes"):
        model(**inputs, logits_to_keep=1)


def test_beams_keep_the_images_of_their_prompt(model: Any) -> None:
    rows = requests()[:5]
    trio.patch(model, PRUNING)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = batch(rows)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        with pytest.raises(UserError, match="mixes up the images"):
            model.generate(**together, **options)
        return
    out = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for index, row in enumerate(rows):
        single = batch([row])
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        length = alone.shape[1]
        assert torch.equal(out[2 * index : 2 * index + 2, :length], alone)


def test_unpatching_gives_the_model_back(model: Any) -> None:
    wanted = run(model, batch(requests()))[1]
    trio.patch(model, PRUNING)
    assert not torch.allclose(run(model, batch(requests()))[1], wanted, atol=1e-3)
    assert torch.equal(run(trio.unpatch(model), batch(requests()))[1], wanted)
