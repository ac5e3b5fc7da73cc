"""The adapters of the Qwen-VL families against the models' and the processors' own functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.support import MANY_SIZES, picture
from tests.pruning.other_methods import CHOOSE, rules_of
from tests.tiny.flop_counter import counter
from tests.tiny.llava import tiny_llava
from tests.tiny.qwen2_5_vl import IMAGE_TOKEN_ID, tiny_qwen, tiny_qwen_processor
from tests.tiny.qwen3_vl import INJECTED, tiny_qwen3, tiny_qwen3_processor
from trio.errors import UserError
from trio.families.adapter import Adapter, Span
from trio.families.registry import adapt
from trio.prefill import PackedPrompts, prefill
from trio.pruning import reference
from trio.pruning.options import Pruning

PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
LAYERS = 6


@dataclass(frozen=True)
class Kind:
    """A family: its tiny model and its processor, and the number of decoder layers behind which
    something is injected."""

    model: Any
    processor: Any
    injected: int

    @cached_property
    def adapter(self) -> Adapter:
        return adapt(self.model(layers=LAYERS))

    def made(self, *pictures: Image.Image) -> dict[str, torch.Tensor]:
        """What the processor makes of these together, with the text that stands for each alone."""
        texts = ["<|image_pad|>"] * len(pictures)
        return dict(
            self.processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
        )

    @cached_property
    def singles(self) -> list[dict[str, torch.Tensor]]:
        return [self.made(picture) for picture in PICTURES]


KINDS = {
    "qwen2_5_vl": Kind(tiny_qwen, tiny_qwen_processor(), 0),
    "qwen3_vl": Kind(tiny_qwen3, tiny_qwen3_processor(), INJECTED),
}


@pytest.fixture(params=KINDS)
def kind(request: Any) -> Kind:
    return KINDS[request.param]


def test_features_are_the_models_own_in_one_pass(kind: Kind) -> None:
    adapter, inputs = kind.adapter, kind.singles
    passes: list[int] = []
    tower = adapter.model.model.visual
    hook = tower.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    features = adapter.encode_images(inputs)
    hook.remove()
    assert passes == [sum(len(image["pixel_values"]) for image in inputs)]

    batch = kind.made(*PICTURES)
    with torch.no_grad():
        own = adapter.model.get_image_features(
            batch["pixel_values"], batch["image_grid_thw"], return_dict=True
        )
    # Of a layer in one tensor or in one for each image, by version.
    injected = [
        (layer if isinstance(layer, torch.Tensor) else torch.cat(layer)).split(
            [len(tokens) for tokens in own.pooler_output]
        )
        for layer in getattr(own, "deepstack_features", ())
    ]
    stacked = zip(*injected, strict=True)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    for image, tokens in zip(features, own.pooler_output, strict=True):
        close(image.tokens, tokens)
    for image, layers in zip(features, stacked, strict=kind.injected > 0):
        for layer, wanted in zip(image.injected, layers, strict=True):
            close(layer, wanted)
    assert {len(image.injected) for image in features} == {kind.injected}
    counts = [len(image) for image in features]
    assert counts == [adapter.visual_tokens(image)[0] for image in inputs]
    assert adapter.visual_tokens(batch) == counts
    assert len(set(counts)) > 5


def test_visual_tokens_are_as_many_as_placeholders_for_images_of_any_size(kind: Kind) -> None:
    sizes = [(width, height) for width in range(1, 150, 29) for height in range(1, 150, 37)]
    images = [picture(0, size) for size in sizes]
    batch = kind.made(*images)
    placeholders = (batch["input_ids"] == IMAGE_TOKEN_ID).sum(dim=1).tolist()
    assert kind.adapter.visual_tokens(batch) == placeholders
    assert len(set(placeholders)) > 8


def prompts(kind: Kind) -> tuple[list[int], list[list[Span]], list[dict[str, torch.Tensor]]]:
    """Lengths and spans of prompts with 1, 0, 3 and 2 images, which end the last; these images."""
    inputs = kind.singles[1:7]
    counts = iter([kind.adapter.visual_tokens(image)[0] for image in inputs])
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


def test_positions_are_the_models_own(kind: Kind) -> None:
    adapter = kind.adapter
    lengths, spans, inputs = prompts(kind)
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


def test_one_position_stands_for_all_axes(kind: Kind) -> None:
    rotary, text = kind.adapter.decoder.rotary, torch.tensor([3, 8])
    for one, other in zip(rotary(text), rotary(text.expand(3, -1)), strict=True):
        assert torch.equal(one, other)


def packed_prompts(kind: Kind, dtype: torch.dtype) -> tuple[PackedPrompts, torch.Tensor]:
    """Random embeddings; what is injected is about as large as the hidden states there."""
    lengths, spans, inputs = prompts(kind)
    positions = kind.adapter.positions(lengths, spans, inputs)
    assert positions is not None
    generator = torch.Generator().manual_seed(3)
    visual = sum(stop - start for own in spans for start, stop in own)
    packed = PackedPrompts(
        embeds_TD=torch.randn(sum(lengths), 64, generator=generator).to(dtype),
        lengths=tuple(lengths),
        images=spans,
        positions_T=positions,
        injected=[
            3 * torch.randn(visual, 64, generator=generator).to(dtype) for _ in range(kind.injected)
        ],
    )
    return packed, positions


SETTINGS = [
    Pruning(schedule="1:20,3:12,5:5", position_ids="keep"),
    Pruning(schedule="0:0.5,2:0.2", position_ids="keep", method="gradient"),
    Pruning(schedule="0:0.8,1:0.6,2:0.5,3:0.3", position_ids="keep"),
    Pruning(retention=0.35, position_ids="renumber"),
    Pruning(
        schedule=f"1:20,{LAYERS}:5",
        position_ids="keep",
        proxy_layer="previous",
        proxy_head="input_embedding",
    ),
    Pruning(schedule="1:20,3:12,5:5", position_ids="keep", method="fastv"),
    Pruning(schedule="2:9", position_ids="renumber", method="fastv"),
]


@pytest.mark.parametrize("pruning", SETTINGS, ids=lambda p: f"{p.schedule or p.retention}")
def test_prefill_equals_the_textbook_prompt_by_prompt(kind: Kind, pruning: Pruning) -> None:
    """Tokens keep their row and column, or what is left counts 0, 1, 2, ... on all axes; what
    is injected comes before, between and behind the stages."""
    adapter = kind.adapter
    packed, positions = packed_prompts(kind, torch.float32)
    got = prefill(adapter.decoder, packed, pruning, None)
    text, head = reference.text_parts(adapter.model, torch.float32)
    lengths = list(packed.lengths)
    places = positions.split(lengths, dim=1)
    given = [sum(stop - start for start, stop in own) for own in packed.images]
    injected = [layer.split(given) for layer in packed.injected]
    for request, embeds in enumerate(packed.embeds_TD.split(lengths)):
        spans = list(packed.images[request])
        book = reference.prefill(
            text,
            head,
            embeds,
            spans,
            [pruning.stages(stop - start, LAYERS) for start, stop in spans],
            rules_of(pruning, usual="keep"),
            choose=CHOOSE[pruning.method],
            positions=places[request],
            injected=[layer[request] for layer in injected],
        )
        assert got.kept[request] == book.kept
        assert [own[request] for own in got.cache_lengths] == book.lengths
        assert [own[request] for own in got.next_positions] == book.next_positions
        torch.testing.assert_close(got.logits_BV[request], book.logits_U, atol=2e-4, rtol=2e-4)
    first = got.next_positions[0]
    assert first == [int(own.max()) + 1 for own in places]
    assert any(next_one < length for next_one, length in zip(first, lengths, strict=True))


def test_the_familys_default_is_to_keep_positions(kind: Kind) -> None:
    assert kind.adapter.default_position_ids == "keep"
    assert adapt(tiny_llava(layers=1)).default_position_ids == "renumber"


def test_inputs_of_another_processor_are_refused(kind: Kind) -> None:
    good, adapter = kind.singles[0], kind.adapter
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


def test_the_tower_costs_what_its_operations_add_up_to(kind: Kind) -> None:
    """With an attention whose scores and sums torch counts."""
    adapter = kind.adapter
    before = adapter.model.config.vision_config._attn_implementation
    adapter.model.model.visual.set_attn_implementation("eager")
    try:
        for image in kind.singles:
            with torch.no_grad(), counter() as operations:
                adapter.encode_images([image])
            assert operations.get_total_flops() == 2 * adapter.vision_flops(image)
    finally:
        adapter.model.model.visual.set_attn_implementation(before)
