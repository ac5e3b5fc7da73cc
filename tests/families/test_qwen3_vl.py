"""What Qwen3-VL has to itself: counts of its published shape, rotation, and what is injected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.engine.support import batch_inputs
from tests.every_family.family import requests_with
from tests.tiny.qwen3_vl import (
    HEAD,
    INJECTED,
    SECTIONS,
    tiny_qwen3,
    tiny_qwen3_processor,
)
from trio.benchmark.shapes.sizes import blueprint
from trio.families.registry import adapt

PROCESSOR: Any = tiny_qwen3_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3(layers=6)


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


def test_what_is_injected_is_as_large_as_what_it_is_added_to(model: Any) -> None:
    """So that a model that forgot it would answer otherwise."""
    inputs = dict(batch_inputs(PROCESSOR, requests_with((1, 0))[:1]))
    (image,) = adapt(model).encode_images([inputs])
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
