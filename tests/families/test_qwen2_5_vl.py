"""What Qwen2.5-VL has to itself: counts of its published shape, rotation, windows of its tower."""

from __future__ import annotations

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny.qwen2_5_vl import SECTIONS, tiny_qwen
from trio.benchmark.shapes.sizes import blueprint
from trio.families.qwen_vision import GridVisionShape
from trio.families.registry import adapt


def test_counts_of_a_7b_shape() -> None:
    adapter = adapt(blueprint("qwen2.5-vl-7b"))
    assert adapter.largest_image == (1008, 1008)
    assert adapter.planned_visual_tokens == 36 * 36
    assert adapter.max_visual_tokens == 128000 == adapter.decoder.max_positions

    grids = torch.tensor([[1, 72, 72], [1, 2, 2], [1, 2, 400], [1, 256, 256]])
    counts = adapter.visual_tokens({"image_grid_thw": grids})
    assert counts == [1296, 1, 200, 16384]
    # With the bounds of the hub's processor, in pixels.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 3584**2})
    sizes = ((1008, 1008), (28, 28), (3584, 3584), (10, 2000))
    patches = [images.get_number_of_image_patches(*size) for size in sizes]
    assert [count // 4 for count in patches] == [1296, 4, 16384, 29]


def test_rotation_takes_each_axis_for_its_section() -> None:
    """Of a head's halves of 8, the first 2 pairs turn with time, 3 with the row, 3 with the column.

    By the definition of M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    adapter = adapt(tiny_qwen(layers=1))
    positions = torch.tensor([[0, 5, 5, 30], [0, 5, 9, 30], [0, 6, 300, 30]])
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(SECTIONS))
    angles = positions[axis].T.double() * 1e4 ** (-torch.arange(8).double() / 8)
    cos, sin = adapter.decoder.rotary(positions)
    assert cos.shape == sin.shape == (1, 4, 16)
    torch.testing.assert_close(cos[0], angles.cos().float().repeat(1, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[0], angles.sin().float().repeat(1, 2), atol=2e-5, rtol=0)


def test_attention_of_the_tower_is_counted_in_windows() -> None:
    shape = GridVisionShape.of_qwen2_5_config(blueprint("qwen2.5-vl-7b").config.vision_config)
    # 72 rows and columns of patches: 9 x 9 whole windows of 64 patches.
    assert shape.attention_flops(72, 72) == 2 * 1280 * (28 * 81 * 64**2 + 4 * 5184**2)
