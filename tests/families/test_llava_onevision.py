"""The LLaVA-OneVision adapter against the model's and the processor's own functions."""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

import trio
from tests.engine.support import MANY_SIZES, model_inputs, picture
from tests.patching.prompts import run
from tests.tiny.llava_onevision import (
    ASPECT_RATIO,
    IMAGE_TOKEN_ID,
    SIDE,
    TILE_TOKENS,
    onevision_processor,
    pinpoints,
    tiny_onevision,
)
from trio.benchmark.shapes.sizes import blueprint
from trio.engine.request import Request
from trio.errors import UserError
from trio.families.adapter import Inputs
from trio.families.llava_onevision import LlavaOnevisionAdapter
from trio.families.registry import adapt
from trio.pruning.options import Pruning

PROCESSOR = onevision_processor()
PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
PROMPTS = [[0], [1, 2], [3], [4, 5, 6], [7], [8]]
"""Which pictures go together."""
Sizes = Sequence[tuple[int, int]]
"""Heights and widths."""


@pytest.fixture(scope="module")
def adapter() -> LlavaOnevisionAdapter:
    return onevision(tiny_onevision(layers=2))


def onevision(model: Any) -> LlavaOnevisionAdapter:
    adapter = adapt(model)
    assert isinstance(adapter, LlavaOnevisionAdapter)
    return adapter


def prompt(*images: Image.Image) -> list[Inputs]:
    """What the engine gets of each image of a prompt."""
    return LlavaOnevisionAdapter.process_images(PROCESSOR, images)


def prompts() -> list[list[Inputs]]:
    return [prompt(*(PICTURES[number] for number in numbers)) for numbers in PROMPTS]


def batch(nested: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What the processor makes of these, without the text."""
    made = PROCESSOR.image_processor(images=nested, return_tensors="pt")
    return {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}


def counts(adapter: LlavaOnevisionAdapter, sizes: Sizes) -> list[int]:
    return adapter.visual_tokens({"image_sizes": torch.tensor(sizes)})


def many_sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths of small and large images, with up to 200 between their edges."""
    chance = random.Random(0)
    edges = [int(6000 ** chance.random()) for _ in range(count)]
    ratios = [(200 if chance.random() < 0.5 else 3) ** chance.uniform(-1, 1) for _ in range(count)]
    return [
        (edge, min(200 * edge, max(1, -(-edge // 200), round(edge * ratio))))
        for edge, ratio in zip(edges, ratios, strict=True)
    ]


def test_counts_of_a_7b_shape() -> None:
    adapter = onevision(blueprint("llava-onevision-7b"))
    # Up to 1.21 times the features of 9 tiles are left as they are, 7938.
    assert adapter.max_visual_tokens == 27 * 27 + 98 * (81 + 1) == 8765
    width, height = adapter.largest_image
    assert counts(adapter, [(height, width), (1336, 1114)]) == [8765, 8765]
    squares = [(384, 384), (768, 768), (1152, 1152), (2304, 2304)]
    assert counts(adapter, squares) == [
        729 + 27 * 28,
        729 + 54 * 55,
        729 + 81 * 82,
        729 + 81 * 82,  # of 162 x 162, interpolated down
    ]
    # 1 of 27 rows of 6 tiles.
    assert counts(adapter, [(10, 2000)]) == [729 + 1 * (162 + 1)]

    processor = onevision_processor(side=384, patch=14, most=6, aspect_ratio="anyres_max_9")
    sizes = many_sizes(4000) + [(height, width) for width in range(1, 2400, 7)]
    expected = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert counts(adapter, sizes) == expected
    assert max(expected) <= adapter.max_visual_tokens
    assert (
        adapter.visual_tokens(
            {"image_sizes": torch.tensor(sizes[:5]), "batch_num_images": torch.tensor([5])}
        )
        == [730] * 5
    )


@pytest.mark.parametrize(
    ("most", "grids"),
    [
        (1, pinpoints(SIDE, 2)),
        (4, [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1))]),
        (9, [[SIDE * rows, SIDE * columns] for rows, columns in ((5, 1), (1, 7), (4, 4), (5, 3))]),
        (4, [[SIDE, SIDE]]),
    ],
    ids=["up-to-2", "next", "gaps", "one"],
)
def test_no_image_passes_the_bound_and_one_comes_near(grids: list[list[int]], most: int) -> None:
    model = tiny_onevision(layers=1)
    model.config.image_grid_pinpoints = grids
    model.config.vision_aspect_ratio = f"anyres_max_{most}"
    adapter = onevision(model)
    sizes = many_sizes(1000) + [(4 * h, 4 * w) for h in range(1, 90, 3) for w in range(1, 90, 3)]
    width, height = adapter.largest_image
    (largest,) = counts(adapter, [(height, width)])
    assert max(counts(adapter, sizes)) <= largest <= adapter.max_visual_tokens
    assert largest >= 0.97 * adapter.max_visual_tokens


def test_features_are_the_models_own_in_one_pass(adapter: LlavaOnevisionAdapter) -> None:
    """Of prompts with one image and prompts with several, one after another."""
    inputs = [image for images in prompts() for image in images]
    passes: list[int] = []
    tower = adapter.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    features = adapter.encode_images(inputs)
    hook.remove()
    tiles = [adapter.tiles(image)[0] for image in inputs]
    assert passes == [sum(tiles)] and len(set(tiles)) > 3

    together = batch([[PICTURES[number] for number in numbers] for numbers in PROMPTS])
    with torch.no_grad():
        own = adapter.model.get_image_features(**together, return_dict=True).pooler_output
    for one, other in zip(features, own, strict=True):
        assert torch.equal(one.tokens, other)
    found = [len(image) for image in features]
    assert found == [adapter.visual_tokens(image)[0] for image in inputs]
    assert found == [image["input_ids"].shape[1] for image in inputs]
    assert adapter.visual_tokens(together) == found and adapter.tiles(together) == tiles
    assert [found[index] for index in (1, 2, 4, 5, 6)] == [TILE_TOKENS + 1] * 5
    assert len(set(found)) == 5


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_images_are_prepared_as_the_chat_template_does(count: int) -> None:
    request = Request(prompt="how many", images=tuple(PICTURES[:count]))
    made = prompt(*PICTURES[:count])
    assert len(made) == count
    if not made:
        return
    expected = model_inputs(PROCESSOR, request)
    assert expected["batch_num_images"].tolist() == [count]
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(torch.cat([image[name] for image in made]), expected[name])
    assert all(image["batch_num_images"].tolist() == [count] for image in made)
    ids = torch.cat([image["input_ids"] for image in made], dim=1)
    assert bool((ids == IMAGE_TOKEN_ID).all())
    assert ids.shape[1] == int((expected["input_ids"] == IMAGE_TOKEN_ID).sum())
    # Nobody gets the pixels of the others with those of one image.
    one = made[0]["pixel_values"]
    assert len(pickle.dumps(one)) < 2 * one.nbytes


def test_what_is_in_tiles_is_said_by_the_call(adapter: LlavaOnevisionAdapter) -> None:
    flat = batch(PICTURES[:3])
    assert flat["batch_num_images"].tolist() == [1, 1, 1]
    tiled = adapter.visual_tokens(flat)
    del flat["batch_num_images"]
    assert adapter.visual_tokens(flat) == tiled and len(set(tiled)) == 3
    nested = batch([[PICTURES[0]], PICTURES[1:3]])
    assert adapter.visual_tokens(nested) == [tiled[0], TILE_TOKENS + 1, TILE_TOKENS + 1]
    few = {**flat, "batch_num_images": torch.tensor([1, 1])}
    with pytest.raises(UserError, match=r"counts 2 images, and there are 3"):
        adapter.visual_tokens(few)


@pytest.mark.parametrize("said", [True, False])
def test_patch_takes_several_images_in_tiles_if_the_call_has_them(said: bool) -> None:
    """As a flat list of images gives them, one tiled image after another in the same prompt."""
    model = tiny_onevision(spread=0.4)
    text = "<image> <image> what is this"
    inputs = dict(PROCESSOR(images=PICTURES[:2], text=[text], return_tensors="pt"))
    if not said:
        del inputs["batch_num_images"]
    new, logits, _ = run(model, inputs)
    trio.patch(model, Pruning(schedule="0:500"))
    kept, same, _ = run(model, inputs)
    assert torch.equal(kept, new)
    torch.testing.assert_close(same, logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        model(**inputs, logits_to_keep=1).logits[0], logits[0, :1], atol=1e-3, rtol=1e-3
    )
    trio.unpatch(model)
    trio.patch(model, Pruning(retention=0.4))
    run(model, inputs)


def test_patch_counts_as_generate_was_told_to() -> None:
    """`generate` passes a `vision_aspect_ratio` on, whatever the config says."""
    model = tiny_onevision(layers=2, spread=0.4)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes it from the config alone")
    ratio = "anyres_max_9"
    processor = onevision_processor(aspect_ratio=ratio)
    image = Image.new("RGB", (3 * SIDE, 3 * SIDE))
    inputs = dict(processor(images=[image], text=["<image> what"], return_tensors="pt"))
    inputs["vision_aspect_ratio"] = ratio
    assert ratio != ASPECT_RATIO
    new, logits, _ = run(model, inputs)
    trio.patch(model, Pruning(schedule="0:500"))
    kept, same, _ = run(model, inputs)
    assert torch.equal(kept, new)
    torch.testing.assert_close(same, logits, atol=1e-3, rtol=1e-3)


def test_inputs_of_another_processor_are_refused(adapter: LlavaOnevisionAdapter) -> None:
    (good,) = prompt(PICTURES[0])
    adapter.check_inputs(good)
    several = prompt(*PICTURES[:2])
    adapter.check_inputs(several[0])

    def fault(inputs: Inputs) -> str:
        with pytest.raises(UserError) as caught:
            adapter.check_inputs(inputs)
        return str(caught.value)

    pixels = good["pixel_values"]
    assert "without image_sizes" in fault({"pixel_values": pixels})
    assert "without pixel_values" in fault({"image_sizes": good["image_sizes"]})
    assert "[1, 3, 44, 44], and the model takes [1, 5, 3, 44, 44]" in fault(
        {**good, "pixel_values": pixels[:, 0]}
    )
    assert "[1, 5, 3, 44, 44], and the model takes [1, 1, 3, 44, 44]" in fault(
        {**good, "batch_num_images": torch.tensor([2])}
    )
    assert "batch_num_images counts 0 images" in fault(
        {**good, "batch_num_images": torch.tensor([], dtype=torch.long)}
    )


@pytest.mark.parametrize("ratio", ["anyres", "anyres_max_0", "anyres_max_9.5"])
def test_an_aspect_ratio_that_cannot_be_counted_with_is_refused(ratio: str) -> None:
    model = tiny_onevision(layers=1)
    model.config.vision_aspect_ratio = ratio
    with pytest.raises(UserError, match=f"vision_aspect_ratio {ratio!r} .* anyres_max_N"):
        adapt(model)


def test_a_tower_whose_features_cannot_be_laid_out_is_refused() -> None:
    model = tiny_onevision(layers=1)
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UserError, match=r"'default' leaves 24 features of a tile of 5 x 5"):
        adapt(model)


@pytest.mark.parametrize("grids", [[], [[SIDE, SIDE], [SIDE, 100]]])
def test_grids_that_are_not_of_whole_tiles_are_refused(grids: list[list[int]]) -> None:
    model = tiny_onevision(layers=1)
    model.config.image_grid_pinpoints = grids
    with pytest.raises(UserError, match=r"image_grid_pinpoints .* no multiples of 44"):
        adapt(model)


def test_another_decoder_is_refused() -> None:
    vision = SiglipVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    text = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=80)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    with pytest.raises(UserError, match="'llama' text decoder is not supported; supported are qw"):
        adapt(model)
