"""`patch` on each family: batches of prompts with images of many sizes, and what follows them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import trio
from tests.engine.support import batch_inputs
from tests.every_family.family import ARCHITECTURES, Family, covering, requests_with
from tests.patching.prompts import assert_keeps_its_answers, run
from trio.decoder.cache_argument import cache_of
from trio.engine.request import Request
from trio.errors import UserError
from trio.patching.forward import repeats_by_prompt

PRUNING = trio.Pruning(retention=0.4)
IMAGES = (1, 2, 0, 1, 3, 1, 0, 1)
"""Of each row."""


@pytest.fixture
def model(family: Family) -> Any:
    return copy.deepcopy(family.model)


def batch(family: Family, rows: list[Request], side: str = "left") -> dict[str, Any]:
    processor = copy.deepcopy(family.processor)
    processor.tokenizer.padding_side = side
    return dict(batch_inputs(processor, rows))


PRUNINGS = {
    "trio": PRUNING,
    "fastv": trio.Pruning(schedule="2:0.4", method="fastv"),
    "divprune": trio.Pruning(retention=0.4, method="divprune"),
}
QUICK = {
    "trio": ARCHITECTURES,
    "fastv": ["qwen3_vl"],
    "divprune": ["llava_onevision"],
}


@pytest.fixture(scope="module")
def unpruned(family: Family) -> list[torch.Tensor]:
    """Logits of each row alone."""
    return [run(family.model, batch(family, [row]))[1] for row in requests_with(IMAGES)]


@pytest.mark.parametrize(
    ("family", "pruning"), covering(PRUNINGS, QUICK), indirect=["family"], scope="module"
)
def test_a_batch_of_many_sizes_equals_singles(
    family: Family, model: Any, unpruned: list[torch.Tensor], pruning: trio.Pruning
) -> None:
    # Which of a thin picture's four tokens, alike but for 1e-13, lie farthest apart is chance.
    rows = requests_with(IMAGES[:-1] if pruning.method == "divprune" else IMAGES)
    trio.patch(model, pruning)
    batches = [run(model, batch(family, rows, side)) for side in ("left", "right")]
    for index, row in enumerate(rows):
        alone = run(model, batch(family, [row]))
        for new, logits, cache in batches:
            assert torch.equal(new[index, None], alone[0])
            torch.testing.assert_close(logits[index, None], alone[1], atol=1e-4, rtol=1e-4)
            for together, single in zip(cache.layers, alone[2].layers, strict=True):
                if IMAGES[index]:
                    assert together.lengths_B[index] == single.lengths_B[0]
        pruned = not torch.allclose(alone[1], unpruned[index], atol=1e-3)
        assert pruned == bool(IMAGES[index])


def test_a_call_of_the_model_itself_prunes_as_generate_does(family: Family, model: Any) -> None:
    """`generate` encodes images before it calls the model; here the model gets them as pixels."""
    inputs = batch(family, requests_with(IMAGES))
    trio.patch(model, PRUNING)
    _, logits, cache = run(model, inputs, max_new_tokens=1)
    out = model(**inputs, logits_to_keep=1)
    torch.testing.assert_close(out.logits[:, 0], logits[:, 0])
    for one, other in zip(cache_of(out).layers, cache.layers, strict=True):
        assert torch.equal(one.lengths_B, other.lengths_B)
    if family.sizes is not None:
        del inputs[family.sizes]
        with pytest.raises(UserError, match=f"without {family.sizes}"):
            model(**inputs, logits_to_keep=1)


def test_images_whose_places_nobody_tells_are_refused(family: Family, model: Any) -> None:
    """Where `generate` would give them those of words."""
    rows = requests_with(IMAGES)
    inputs, text = batch(family, rows), batch(family, [rows[2], rows[6]])
    trio.patch(model, PRUNING)
    logits = run(model, inputs, max_new_tokens=1)[1]
    kinds = inputs.pop("mm_token_type_ids", None)
    text.pop("mm_token_type_ids", None)
    assert ("mm_token_type_ids" in inspect.signature(model.forward).parameters) == (
        kinds is not None
    )
    assert run(model, text)[0].shape == (2, 6)
    if kinds is None:
        return
    with pytest.raises(UserError, match="without mm_token_type_ids"):
        run(model, inputs)
    with pytest.raises(UserError, match="without mm_token_type_ids"):
        model(**inputs, logits_to_keep=1)
    encoded = {name: inputs[name] for name in inputs if name not in ("pixel_values", family.sizes)}
    encoded["mm_encoder_outputs"] = {
        "image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    }
    with pytest.raises(UserError, match="without mm_token_type_ids"):
        run(model, encoded)
    positions, _ = model.model.get_rope_index(**inputs, mm_token_type_ids=kinds)
    out = model(**inputs, position_ids=positions, logits_to_keep=1)
    torch.testing.assert_close(out.logits, logits)
    unpruned = run(trio.unpatch(model), inputs, max_new_tokens=1)[1]
    right = run(model, {**inputs, "mm_token_type_ids": kinds}, max_new_tokens=1)[1]
    assert not torch.allclose(unpruned, right, atol=1e-3)


def test_generate_says_what_its_inputs_lack(family: Family, model: Any) -> None:
    inputs = batch(family, requests_with(IMAGES))
    trio.patch(model, PRUNING)
    with pytest.raises(UserError, match="DynamicCache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    if family.sizes is not None:
        del inputs[family.sizes]
        with pytest.raises(UserError, match=f"without {family.sizes}"):
            model.generate(**inputs, max_new_tokens=2)


def test_token_ids_may_come_under_either_name(family: Family, model: Any) -> None:
    inputs = batch(family, requests_with(IMAGES[:3]))
    trio.patch(model, PRUNING)
    named, _, _ = run(model, inputs)
    ids = inputs.pop("input_ids")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    other = model.generate(inputs=ids, input_ids=None, **inputs, **settings)
    assert torch.equal(other[:, ids.shape[1] :], named)


def test_beams_keep_the_images_of_their_prompt(family: Family, model: Any) -> None:
    rows = requests_with(IMAGES)[:4]
    trio.patch(model, PRUNING)
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = batch(family, rows)
    if not repeats_by_prompt(model):
        with pytest.raises(UserError, match="mixes up the images"):
            model.generate(**together, **options)
        return
    out = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for index, row in enumerate(rows):
        single = batch(family, [row])
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        length = alone.shape[1]
        assert torch.equal(out[2 * index : 2 * index + 2, :length], alone)


def test_inference_mode(family: Family, model: Any) -> None:
    trio.patch(model, PRUNING)
    inputs = batch(family, requests_with(IMAGES[:3]))
    wanted = run(model, inputs)
    with torch.inference_mode():
        got = run(model, inputs)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


def test_unpatching_gives_the_model_back(family: Family, model: Any) -> None:
    inputs = batch(family, requests_with(IMAGES))
    wanted = run(model, inputs, max_new_tokens=2)[1]
    trio.patch(model, PRUNING)
    assert not torch.allclose(run(model, inputs, max_new_tokens=2)[1], wanted, atol=1e-3)
    assert torch.equal(run(trio.unpatch(model), inputs, max_new_tokens=2)[1], wanted)


def test_one_that_keeps_all_answers_as_unpatched_and_goes_on(family: Family, model: Any) -> None:
    rows = requests_with(IMAGES)
    assert_keeps_its_answers(model, lambda side: batch(family, rows, side))
