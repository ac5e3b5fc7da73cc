"""The Qwen2.5-VL adapter against the model's and the processor's own functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import oracle
from tests.engine.support import MANY_SIZES, picture
from tests.models import tiny_llava
from tests.qwen import IMAGE_TOKEN_ID, SECTIONS, meta_qwen_7b, tiny_qwen, tiny_qwen_processor
from trio.config import Pruning
from trio.errors import UserError
from trio.models.adapter import Adapter, Span
from trio.models.prefill import PackedPrompts, prefill
from trio.models.registry import adapt
from trio.pruning.cost import WindowedVisionShape
from trio.pruning.saliency import saliency

PROCESSOR: Any = tiny_qwen_processor()
PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
LAYERS = 6


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return adapt(tiny_qwen(layers=LAYERS))


def made(*pictures: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of these together, with the text that stands for each alone."""
    texts = ["<|image_pad|>"] * len(pictures)
    return dict(PROCESSOR(images=list(pictures), text=texts, padding=True, return_tensors="pt"))


def singles() -> list[dict[str, torch.Tensor]]:
    return [made(picture) for picture in PICTURES]


def test_counts_of_a_7b_shape() -> None:
    adapter = adapt(meta_qwen_7b())
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


def test_features_are_the_models_own_in_one_pass(adapter: Adapter) -> None:
    inputs = singles()
    passes: list[int] = []
    tower = adapter.model.model.visual
    hook = tower.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    features = adapter.encode_images(inputs)
    hook.remove()
    assert passes == [sum(len(image["pixel_values"]) for image in inputs)]

    batch = made(*PICTURES)
    with torch.no_grad():
        own = adapter.model.get_image_features(
            batch["pixel_values"], batch["image_grid_thw"], return_dict=True
        ).pooler_output
    for one, other in zip(features, own, strict=True):
        torch.testing.assert_close(one.tokens, other, atol=1e-5, rtol=1e-5)
    counts = [len(image) for image in features]
    assert counts == [adapter.visual_tokens(image)[0] for image in inputs]
    assert adapter.visual_tokens(batch) == counts
    assert len(set(counts)) > 5
    for image, together in zip(inputs, features, strict=True):
        (alone,) = adapter.encode_images([image])
        torch.testing.assert_close(together.tokens, alone.tokens, atol=1e-5, rtol=1e-5)


def test_placeholders_are_as_many_as_features(adapter: Adapter) -> None:
    ids = made(*PICTURES)["input_ids"]
    features = adapter.encode_images(singles())
    assert (ids == IMAGE_TOKEN_ID).sum(dim=1).tolist() == list(map(len, features))


def prompts(adapter: Adapter) -> tuple[list[int], list[list[Span]], list[dict[str, torch.Tensor]]]:
    """Lengths and spans of prompts with 1, 0, 3 and 2 images, which end the last; these images."""
    inputs = singles()[1:7]
    counts = iter([adapter.visual_tokens(image)[0] for image in inputs])
    lengths, spans = [], []
    for before, after, images in ((3, 9, 1), (12, 0, 0), (0, 7, 3), (5, 0, 2)):
        own, place = [], before
        for _ in range(images):
            count = next(counts)
            own.append((place, place + count))
            place += count + 1
        lengths.append((own[-1][1] if own else place) + after)
        spans.append(own)
    return lengths, spans, inputs


def test_positions_are_the_models_own(adapter: Adapter) -> None:
    lengths, spans, inputs = prompts(adapter)
    positions = adapter.positions(lengths, spans, inputs)
    assert positions is not None and positions.shape == (3, sum(lengths))
    images = iter(inputs)
    for length, own, got in zip(lengths, spans, positions.split(lengths, dim=1), strict=True):
        kinds = torch.zeros(1, length, dtype=torch.long)
        for start, stop in own:
            kinds[0, start:stop] = 1
        grids = [next(images)["image_grid_thw"] for _ in own]
        wanted, _ = adapter.model.model.get_rope_index(
            torch.where(kinds == 1, IMAGE_TOKEN_ID, 20),
            kinds,
            image_grid_thw=torch.cat(grids) if grids else None,
        )
        assert torch.equal(got, wanted[:, 0])


def test_rotation_takes_each_axis_for_its_section(adapter: Adapter) -> None:
    """Of a head's halves of 8, the first 2 pairs turn with time, 3 with the row, 3 with the column.

    By the definition of M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    positions = torch.tensor([[0, 5, 5, 30], [0, 5, 9, 30], [0, 6, 300, 30]])
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(SECTIONS))
    angles = positions[axis].T.double() * 1e4 ** (-torch.arange(8).double() / 8)
    cos, sin = adapter.decoder.rotary(positions)
    assert cos.shape == sin.shape == (1, 4, 16)
    torch.testing.assert_close(cos[0], angles.cos().float().repeat(1, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[0], angles.sin().float().repeat(1, 2), atol=2e-5, rtol=0)
    text = torch.tensor([3, 8])
    for one, other in zip(
        adapter.decoder.rotary(text), adapter.decoder.rotary(text.expand(3, -1)), strict=True
    ):
        assert torch.equal(one, other)


def embeddings(adapter: Adapter, dtype: torch.dtype) -> tuple[PackedPrompts, torch.Tensor]:
    lengths, spans, inputs = prompts(adapter)
    positions = adapter.positions(lengths, spans, inputs)
    assert positions is not None
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(sum(lengths), 64, generator=generator).to(dtype)
    packed = PackedPrompts(
        embeds_TD=embeds, lengths=tuple(lengths), images=spans, positions_T=positions
    )
    return packed, positions


@pytest.mark.parametrize("proxy_positions", ["reference", "with_last"])
def test_saliency_equals_the_textbook(proxy_positions: str) -> None:
    model = tiny_qwen(layers=LAYERS, dtype=torch.float64)
    adapter = adapt(model)
    packed, positions = embeddings(adapter, torch.float64)
    lengths = list(packed.lengths)
    got = saliency(
        adapter.decoder.proxy(2), packed.embeds_TD, positions, lengths, proxy_positions
    ).true_scores(lengths)
    text, head = oracle.text_parts(model, torch.float64)
    places = positions.split(lengths, dim=1)
    flat = [torch.arange(length).expand(3, -1) for length in lengths]
    for own, hidden, place, plain in zip(
        got.split(lengths), packed.embeds_TD.split(lengths), places, flat, strict=True
    ):
        book, _ = oracle.saliency(text, head, 2, hidden, place, proxy_positions)
        # The norms of transformers work in float32 whatever the model's dtype.
        torch.testing.assert_close(own, book, atol=1e-9, rtol=2e-5)
        other, _ = oracle.saliency(text, head, 2, hidden, plain, proxy_positions)
        same = torch.allclose(own, other, rtol=1e-3)
        assert same == torch.equal(place, plain)


SETTINGS = [
    Pruning(schedule="1:20,3:12,5:5", position_ids="keep"),
    Pruning(schedule="0:0.5,2:0.2", position_ids="keep", method="gradient"),
    Pruning(retention=0.35, position_ids="renumber"),
    Pruning(
        schedule=f"1:20,{LAYERS}:5",
        position_ids="keep",
        proxy_layer="previous",
        proxy_head="input_embedding",
    ),
]


@pytest.mark.parametrize("pruning", SETTINGS, ids=lambda p: f"{p.schedule or p.retention}")
def test_prefill_equals_the_textbook_prompt_by_prompt(adapter: Adapter, pruning: Pruning) -> None:
    """Tokens keep their row and column, or what is left counts 0, 1, 2, ... on all axes."""
    packed, positions = embeddings(adapter, torch.float32)
    got = prefill(adapter.decoder, packed, pruning, None)
    text, head = oracle.text_parts(adapter.model, torch.float32)
    lengths = list(packed.lengths)
    places = positions.split(lengths, dim=1)
    for request, embeds in enumerate(packed.embeds_TD.split(lengths)):
        spans = list(packed.images[request])
        book = oracle.prefill(
            text,
            head,
            embeds,
            spans,
            [pruning.stages(stop - start, LAYERS) for start, stop in spans],
            proxy_layer=pruning.proxy_layer,
            proxy_head=pruning.proxy_head,
            position_ids=pruning.position_ids or "",
            suppress=pruning.method == "trio",
            positions=places[request],
        )
        assert got.kept[request] == book.kept
        assert [own[request] for own in got.cache_lengths] == book.lengths
        assert [own[request] for own in got.next_positions] == book.next_positions
        torch.testing.assert_close(got.logits_BV[request], book.logits_V, atol=2e-4, rtol=2e-4)
    first = got.next_positions[0]
    assert first == [int(own.max()) + 1 for own in places]
    assert any(next_one < length for next_one, length in zip(first, lengths, strict=True))


def test_the_familys_default_is_to_keep_positions(adapter: Adapter) -> None:
    assert adapter.default_position_ids == "keep"
    assert adapt(tiny_llava(layers=1)).default_position_ids == "renumber"


def test_inputs_of_another_processor_are_refused(adapter: Adapter) -> None:
    good = singles()[0]
    adapter.check_inputs(good)

    def fault(inputs: Mapping[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            adapter.check_inputs(inputs)
        return str(caught.value)

    assert "without image_grid_thw" in fault({"pixel_values": good["pixel_values"]})
    assert "without pixel_values" in fault({"image_grid_thw": good["image_grid_thw"]})
    short = {**good, "pixel_values": good["pixel_values"][:-1]}
    assert "[255, 96], and the model takes [256, 96]" in fault(short)
    for grid in ([[1, 5, 4]], [[1, 0, 4]], [[1, 16, 16]] * 2):
        assert "multiples of 2" in fault({**good, "image_grid_thw": torch.tensor(grid)})
    assert "videos are not" in fault({**good, "image_grid_thw": torch.tensor([[2, 16, 16]])})


def test_the_tower_costs_what_its_operations_add_up_to(adapter: Adapter) -> None:
    """Torch counts two operations a multiply-add, and none in the attention kernel of a CPU."""
    images = singles()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapter.encode_images(images)
    shape = WindowedVisionShape.of_config(adapter.model.config.vision_config)
    grids = [image["image_grid_thw"][0].tolist()[1:] for image in images]
    attention = sum(shape.attention_flops(rows, columns) for rows, columns in grids)
    counted = sum(adapter.vision_flops(image) for image in images)
    assert counter.get_total_flops() == 2 * (counted - attention)


def test_attention_of_the_tower_is_counted_in_windows(adapter: Adapter) -> None:
    """Against what its attention is called with: scores and sums of every query and key."""
    vision = adapter.model.config.vision_config
    before = vision._attn_implementation
    adapter.model.model.visual.set_attn_implementation("eager")
    try:
        for image in singles():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                adapter.encode_images([image])
            assert counter.get_total_flops() == 2 * adapter.vision_flops(image)
    finally:
        adapter.model.model.visual.set_attn_implementation(before)
    shape = WindowedVisionShape.of_config(meta_qwen_7b().config.vision_config)
    # 72 rows and columns of patches: 9 x 9 whole windows of 64 patches.
    assert shape.attention_flops(72, 72) == 2 * 1280 * (28 * 81 * 64**2 + 4 * 5184**2)
