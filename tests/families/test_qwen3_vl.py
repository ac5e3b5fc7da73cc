"""What Qwen3-VL has to itself: counts of its published shape, rotation, and what is injected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import trio
from tests.engine.support import batch_inputs
from tests.families.family import requests_with
from tests.tiny.qwen3_vl import (
    HEAD,
    INJECTED,
    SECTIONS,
    tiny_qwen3,
    tiny_qwen3_processor,
)
from trio.benchmark.shapes.sizes import blueprint
from trio.families.adapter import Features, joined
from trio.families.registry import adapt
from trio.prefill import PackedPrompts, Prefilled, prefill

PROCESSOR: Any = tiny_qwen3_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3(layers=6)


def batch(images: tuple[int, ...]) -> dict[str, Any]:
    """Rows with so many images each."""
    requests = requests_with((*images, *[0] * (8 - len(images))))[: len(images)]
    return dict(batch_inputs(PROCESSOR, requests))


def test_counts_of_an_8b_shape() -> None:
    adapter = adapt(blueprint("qwen3-vl-8b"))
    assert adapter.largest_image == (1024, 1024)
    assert adapter.planned_visual_tokens == 32 * 32
    assert adapter.max_visual_tokens == 262144 == adapter.decoder.max_positions
    grids = torch.tensor([[1, 64, 64], [1, 2, 2], [1, 2, 400], [1, 256, 256]])
    counts = adapter.visual_tokens({"image_grid_thw": grids})
    assert counts == [1024, 1, 200, 16384]
    # With the bounds of the hub's processor, in pixels.
    images = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216}
    )
    sizes = ((1024, 1024), (28, 28), (4096, 4096), (640, 480))
    patches = [images.get_number_of_image_patches(*size) for size in sizes]
    assert [count // 4 for count in patches] == [1024, 64, 16384, 300]


def test_rotation_takes_the_axes_in_turn(model: Any) -> None:
    """Of a head's halves of 12 pairs, numbers 1, 4 and 7 turn with the row, 2, 5 and 8 with the
    column, all others with time (the interleaved M-RoPE of Qwen3-VL)."""
    assert SECTIONS == [6, 3, 3] and HEAD == 24
    axis = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0])
    positions = torch.tensor([[0, 5, 5, 30], [0, 5, 9, 30], [0, 6, 300, 30]])
    angles = positions[axis].T.double() * 1e4 ** (-torch.arange(12).double() / 12)
    cos, sin = adapt(model).decoder.rotary(positions)
    assert cos.shape == sin.shape == (1, 4, HEAD)
    torch.testing.assert_close(cos[0], angles.cos().float().repeat(1, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[0], angles.sin().float().repeat(1, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_may_be_the_input_embedding(tied: bool) -> None:
    model = tiny_qwen3(layers=2, tied=tied)
    decoder = adapt(model).decoder
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == tied
    hidden = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model.lm_head(decoder.model.norm(hidden))
        torch.testing.assert_close(decoder.head(hidden), wanted)


def result(model: Any, features: list[Features], inputs: dict[str, Any]) -> Prefilled:
    """Of a prefill of a batch with stages before, between and behind the layers that inject."""
    adapter = adapt(model)
    real = inputs["attention_mask"].bool()
    tokens = [ids[own] for ids, own in zip(inputs["input_ids"], real, strict=True)]
    counts = iter(features)
    spans = []
    for row in tokens:
        needed = int((row == adapter.image_token_id).sum())
        own: list[int] = []
        while sum(own) < needed:
            own.append(len(next(counts)))
        spans.append(adapter.spans(row, own))
    lengths = tuple(map(len, tokens))
    packed = PackedPrompts(
        embeds_TD=adapter.embed(torch.cat(tokens), features),
        lengths=lengths,
        images=spans,
        positions_T=adapter.positions(lengths, spans, [inputs]),
        injected=joined(features),
    )
    pruning = trio.Pruning(schedule="0:0.8,1:0.6,2:0.5,3:0.3", method="random", position_ids="keep")
    return prefill(adapter.decoder, packed, pruning, None)


def features_of(model: Any, inputs: dict[str, Any]) -> list[Features]:
    grids, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    own = pixels.split(grids.prod(dim=1).tolist())
    return adapt(model).encode_images(
        [
            {"pixel_values": image, "image_grid_thw": grid[None]}
            for image, grid in zip(own, grids, strict=True)
        ]
    )


@pytest.mark.parametrize("layer", range(INJECTED))
def test_each_injected_row_belongs_to_its_token(model: Any, layer: int) -> None:
    """The same tokens are kept whatever is injected; rows that change places change the result, and
    that of prompts with images alone."""
    inputs = batch((1, 0, 2))
    features = features_of(model, inputs)
    wanted = result(model, features, inputs)
    turned = []
    for image in features:
        layers = list(image.injected)
        layers[layer] = layers[layer].roll(1, dims=0)
        turned.append(replace(image, injected=tuple(layers)))
    got = result(model, turned, inputs)
    assert got.kept == wanted.kept
    off = (got.logits_BV - wanted.logits_BV).abs().amax(dim=1)
    assert off[1] == 0 and min(off[0], off[2]) > 0.05


def test_what_is_injected_is_as_large_as_what_it_is_added_to(model: Any) -> None:
    """So that a model that forgot it would answer otherwise."""
    inputs = batch((1,))
    (image,) = features_of(model, inputs)
    assert len(image.injected) == INJECTED
    hidden: list[torch.Tensor] = []
    layers = model.model.language_model.layers[:INJECTED]
    hooks = [layer.register_forward_hook(lambda *a: hidden.append(a[2])) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    ratios = [
        float(added.std() / beside.std())
        for added, beside in zip(image.injected, hidden, strict=True)
    ]
    assert min(ratios) > 0.3 and max(ratios) < 3
