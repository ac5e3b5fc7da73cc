"""Patched models that make a number of visual tokens of their own of each image of a batch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import trio
from tests.engine.support import MANY_SIZES, batch_inputs, picture
from tests.models import LLAVA_NEXT, PINPOINTS, tiny_llava, tiny_processor
from tests.patching.prompts import run
from tests.qwen import SPECIAL, tiny_qwen, tiny_qwen_processor
from trio.engine.request import Request
from trio.errors import UserError

PRUNING = trio.Pruning(retention=0.4)
IMAGES = (1, 2, 0, 1, 3, 1, 0, 1)
"""Of each row."""


@pytest.fixture(params=["llava_next", "qwen2_5_vl"])
def model(request: Any) -> Any:
    return tiny_llava(**LLAVA_NEXT) if request.param == "llava_next" else tiny_qwen()


def requests() -> list[Request]:
    pictures = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
    prompts = ["what is this", "how many", "describe the picture please", "where is red ?"] * 2
    rows = []
    for count, prompt in zip(IMAGES, prompts, strict=True):
        rows.append(Request(prompt=prompt, images=tuple(pictures[:count])))
        del pictures[:count]
    assert not pictures
    return rows


def batch(model: Any, rows: list[Request], side: str = "left") -> dict[str, Any]:
    processor: Any = tiny_qwen_processor()
    if model.config.model_type == "llava_next":
        processor = tiny_processor(patch_size=8, pinpoints=PINPOINTS)
    processor.tokenizer.padding_side = side
    return dict(batch_inputs(processor, rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_many_sizes_equals_singles(model: Any, side: str) -> None:
    unpruned = [run(model, batch(model, [request]))[1] for request in requests()]
    trio.patch(model, PRUNING)
    new, logits, cache = run(model, batch(model, requests(), side))
    for index, request in enumerate(requests()):
        alone = run(model, batch(model, [request]))
        assert torch.equal(new[index, None], alone[0])
        torch.testing.assert_close(logits[index, None], alone[1], atol=2e-5, rtol=1e-4)
        for together, single in zip(cache.layers, alone[2].layers, strict=True):
            if IMAGES[index]:
                assert together.lengths_B[index] == single.lengths_B[0]
        pruned = not torch.allclose(alone[1], unpruned[index], atol=1e-3)
        assert pruned == bool(IMAGES[index])


def test_a_call_of_the_model_itself_prunes_as_generate_does(model: Any) -> None:
    """`generate` encodes images before it calls the model; here the model gets them as pixels."""
    inputs = batch(model, requests())
    trio.patch(model, PRUNING)
    _, logits, cache = run(model, inputs, max_new_tokens=1)
    out = model(**inputs, logits_to_keep=1)
    torch.testing.assert_close(out.logits[:, 0], logits[:, 0])
    for one, other in zip(out.past_key_values.layers, cache.layers, strict=True):
        assert torch.equal(one.lengths_B, other.lengths_B)
    sizes = next(name for name in ("image_sizes", "image_grid_thw") if name in inputs)
    del inputs[sizes]
    with pytest.raises(UserError, match=f"without {sizes}"):
        model(**inputs, logits_to_keep=1)


def test_beams_keep_the_images_of_their_prompt(model: Any) -> None:
    rows = requests()[:5]
    trio.patch(model, PRUNING)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = batch(model, rows)
    encodes_ahead = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not encodes_ahead and model.config.model_type == "llava_next":
        with pytest.raises(UserError, match="mixes up the images"):
            model.generate(**together, **options)
        return
    out = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for index, row in enumerate(rows):
        single = batch(model, [row])
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        length = alone.shape[1]
        assert torch.equal(out[2 * index : 2 * index + 2, :length], alone)


def test_inference_mode(model: Any) -> None:
    trio.patch(model, PRUNING)
    wanted = run(model, batch(model, requests()))
    with torch.inference_mode():
        got = run(model, batch(model, requests()))
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


def test_unpatching_gives_the_model_back(model: Any) -> None:
    wanted = run(model, batch(model, requests()))[1]
    trio.patch(model, PRUNING)
    assert not torch.allclose(run(model, batch(model, requests()))[1], wanted, atol=1e-3)
    assert torch.equal(run(trio.unpatch(model), batch(model, requests()))[1], wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_qwen_that_keeps_all_answers_as_unpatched_and_goes_on(side: str) -> None:
    """Its positions are then all that could differ: in the prompt, the answer and a follow-up."""
    model = tiny_qwen(spread=0.4)
    all_kept = trio.Pruning(schedule="0:500,2:500")
    inputs = batch(model, requests(), "left")
    wanted = run(model, inputs)
    trio.patch(model, all_kept)
    if side == "right":
        # Unpatched, a right-padded row's first token is predicted from its padding.
        inputs = batch(model, requests(), "right")
    got = run(model, inputs)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], atol=1e-3, rtol=1e-3)

    def follow_up(answer: Any, inputs: dict[str, Any], cache: Any) -> Any:
        ids = torch.cat([inputs["input_ids"], answer, torch.full((len(answer), 3), 20)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(answer), 9).long()], dim=1)
        return run(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    second = follow_up(got[0], inputs, got[2])
    trio.unpatch(model)
    inputs = batch(model, requests(), "left")
    new, _, cache = run(model, inputs)
    book = follow_up(new, inputs, cache)
    assert torch.equal(second[0], book[0])
    torch.testing.assert_close(second[1], book[1], atol=1e-3, rtol=1e-3)


def test_videos_are_refused() -> None:
    model = trio.patch(tiny_qwen(), PRUNING)
    video = SPECIAL.index("<|video_pad|>")
    ids = torch.tensor([[20, 21, *[video] * 8, 22, 23]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == video).long(),
        "pixel_values_videos": torch.randn(32, 96),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    with pytest.raises(UserError, match="videos are not pruned"):
        model(**inputs, logits_to_keep=1)
    with pytest.raises(UserError, match="videos are not pruned"):
        model.generate(**inputs, max_new_tokens=2)
    frames = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[2, 4, 4]])}
    ids = ids.masked_fill(ids == video, SPECIAL.index("<|image_pad|>"))
    with pytest.raises(UserError, match="says 2 frames: videos are not"):
        model(input_ids=ids, **frames, logits_to_keep=1)
