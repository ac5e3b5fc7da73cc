"""Counted cost against published figures and against counted operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import bmm_flop
from transformers import LlamaConfig

from tests.tiny.flop_counter import counter
from tests.tiny.llava import LLAVA_NEXT, Strategy, tiny_llava, tiny_processor
from tests.tiny.llava_onevision import onevision_processor, tiny_onevision
from tests.tiny.qwen3_vl import tiny_qwen3
from trio.benchmark.shapes.sizes import blueprint, processor
from trio.benchmark.speed.paper_cost import cost
from trio.decoder.attention import Packed
from trio.encoders.reduction import reduction
from trio.encoders.scan import Scan
from trio.encoders.visionzip import VisionZip
from trio.families.llava_vision import TiledAdapter, VisionShape
from trio.families.registry import adapt
from trio.pruning.flops import DecoderShape, layer_average
from trio.pruning.methods import divprune
from trio.pruning.methods.divprune import DivPrune
from trio.pruning.methods.fastv import FastV
from trio.pruning.options import Pruning
from trio.pruning.schedule import Schedule, tokens_per_layer
from trio.pruning.scores.last_token_attention import last_attention
from trio.pruning.scores.layer_gradient import LayerGradient

TEXT_TOKENS = 60


def test_the_published_setting_on_a_7b_shape() -> None:
    adapter = adapt(blueprint("llava-1.5-7b"))
    shape = adapter.shape()
    assert adapter.max_visual_tokens == 576
    stages = Schedule.for_retention(1 / 9, shape.num_layers, 576).counts(576)
    assert stages == [(1, 92), (10, 54), (15, 22)]
    visual = tokens_per_layer(576, stages, shape.num_layers)
    assert sum(visual) / shape.num_layers == 64.0
    assert layer_average(576, visual) == pytest.approx(1 / 9)

    # Published: 318 MB and 62 MB of KV, 5.13x. That is 60 tokens of text beside the image.
    pruned = [count + TEXT_TOKENS for count in visual]
    full = [576 + TEXT_TOKENS] * shape.num_layers
    assert shape.kv_bytes(full, 2) / 2**20 == 318.0
    assert shape.kv_bytes(pruned, 2) / 2**20 == 62.0
    assert shape.kv_bytes(full, 2) / shape.kv_bytes(pruned, 2) == pytest.approx(5.129, abs=1e-3)

    # Published: 2.98 T and 0.45 T, 6.62x. That is visual tokens without any text, the FFN counted
    # as two products, and on the pruned side about one layer forward for each proxy.
    two = replace(shape, ffn_products=2)
    unpruned = two.prefill_flops([576] * 32)
    alone = two.prefill_flops(visual)
    scored = [576, 92, 54]
    forwards = sum(map(two.layer_flops, scored))
    assert unpruned / 1e12 == pytest.approx(2.986, abs=1e-3)
    assert unpruned / alone == pytest.approx(9.170, abs=1e-3)
    assert unpruned / (alone + forwards) == pytest.approx(6.76, abs=5e-3)

    # With the text in, and all that the method itself costs.
    for counted, expected in ((two, (5.244, 4.944, 4.054)), (shape, (5.219, 4.977, 4.234))):
        before, after = counted.prefill_flops(full), counted.prefill_flops(pruned)
        proxy = sum(counted.proxy_flops(count + TEXT_TOKENS, rows=4) for count in scored)
        vision = adapter.vision_flops({"pixel_values": torch.empty(1, 3, 336, 336)})
        ratios = (
            before / after,
            before / (after + proxy),
            (before + vision) / (after + proxy + vision),
        )
        assert ratios == pytest.approx(expected, abs=1e-3)


NINTH = Pruning(retention=1 / 9)
PUBLISHED_NEXT = Pruning(schedule="1:436,10:255,15:173")
# Of LLaVA-NeXT: 5 tiles and a newline for each of 48 rows; of an image of 3:2 only 32 rows.
README = [
    ("llava-1.5-7b", NINTH, (336, 336), 576, (5.219, 4.969, 4.228, 5.129)),
    ("llava-next-7b", NINTH, (672, 672), 2928, (8.361, 7.831, 6.052, 7.755)),
    ("llava-next-7b", PUBLISHED_NEXT, (672, 672), 2928, (7.941, 7.456, 5.835, 7.362)),
    ("llava-next-7b", PUBLISHED_NEXT, (672, 448), 2144, (6.122, 5.816, 4.528, 5.779)),
    ("qwen2.5-vl-7b", NINTH, (1008, 1008), 1296, (6.825, 6.658, 2.562, 6.646)),
    ("qwen3-vl-8b", NINTH, (1024, 1024), 1024, (6.428, 6.200, 2.584, 6.231)),
    ("llava-onevision-7b", NINTH, (1008, 1008), 7371, (9.551, 9.160, 6.395, 8.454)),
]
STAGES = {
    "llava-1.5-7b": [(1, 92), (10, 54), (15, 22)],
    "llava-next-7b": [(1, 401), (10, 234), (15, 159)],
    "qwen2.5-vl-7b": [(1, 196), (9, 116), (13, 47)],
    "qwen3-vl-8b": [(1, 170), (11, 100), (17, 41)],
    "llava-onevision-7b": [(1, 1117), (9, 655), (13, 267)],
}


@pytest.mark.parametrize(("name", "pruning", "image", "tokens", "ratios"), README)
def test_the_table_in_the_readme(
    name: str, pruning: Pruning, image: tuple[int, int], tokens: int, ratios: tuple[float, ...]
) -> None:
    model = blueprint(name)
    found = cost(model, processor(name), pruning, image=image, prompt_tokens=TEXT_TOKENS)
    assert found.visual_tokens == tokens
    got = (found.decoder, found.chosen, found.whole, found.kv_cache)
    assert got == pytest.approx(ratios, abs=1e-3)
    if pruning is NINTH:
        assert found.stages == STAGES[name]
        layers = adapt(model).decoder.num_layers
        present = tokens_per_layer(tokens, found.stages, layers)
        assert sum(present) / layers == pytest.approx(tokens / 9, abs=1)
        assert found.retention == pytest.approx(sum(present) / layers / tokens)


TINY = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3}


@pytest.mark.parametrize("family", TINY)
def test_layers_cost_what_the_operations_add_up_to(family: str) -> None:
    """Torch counts two operations a multiply-add, and none in the attention kernel of a CPU."""
    adapter = adapt(TINY[family](layers=3))
    decoder, shape = adapter.decoder, adapter.shape()
    tokens = 40
    hidden = torch.randn(tokens, shape.hidden_size)
    rotary = decoder.rotary(torch.arange(tokens))  # in some versions a product, too
    with torch.no_grad(), decoder.ragged(), counter() as operations:
        decoder.run_layers(0, 3, hidden, rotary, Packed((tokens,)), None)
    attention = 3 * 2 * tokens**2 * shape.query_size
    assert operations.get_total_flops() == 2 * (shape.prefill_flops([tokens] * 3) - attention)


@pytest.mark.parametrize("family", TINY)
def test_the_proxy_costs_what_its_operations_add_up_to(family: str) -> None:
    adapter = adapt(TINY[family](layers=3))
    decoder, shape = adapter.decoder, adapter.shape()
    assert shape.normed_keys == (family == "qwen3_vl")
    tokens, rows = 400, [395, 396, 397, 398]
    hidden = torch.randn(tokens, shape.hidden_size)
    proxy = LayerGradient(decoder, 1)
    in_place = {torch.ops.aten.baddbmm_: lambda *shapes, **_: bmm_flop(*shapes[1:3])}
    with counter(in_place) as operations:
        forward = proxy.forward(hidden, torch.arange(tokens), [rows], [tokens], [(0, 395)])
        forward.gradient_norms(forward.logits_RV, forward.logits_RV[:, 0])
    # The rows' own keys and values are computed once more by the layer and not used.
    extra = len(rows) * shape.hidden_size * shape.kv_size * 2
    counted = operations.get_total_flops() / 2
    assert counted == pytest.approx(shape.proxy_flops(tokens, len(rows)) + extra, rel=0.02)


@pytest.mark.parametrize("family", TINY)
def test_attention_costs_what_its_operations_add_up_to(family: str) -> None:
    adapter = adapt(TINY[family](layers=3))
    decoder, shape = adapter.decoder, adapter.shape()
    hidden, positions = torch.randn(400, shape.hidden_size), torch.arange(400)
    with counter() as operations:
        decoder.rotary(positions)  # in some versions a product, too
    rotary = operations.get_total_flops()
    with counter() as operations:
        last_attention(decoder, 1, hidden, positions, [400])
    # The row's own key, value and output are computed by the layer and not used.
    extra = shape.hidden_size * (2 * shape.kv_size + shape.query_size)
    counted = (operations.get_total_flops() - rotary) / 2
    assert counted == FastV().flops(shape, 400, []) + extra


def test_diversity_costs_what_its_operations_add_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divprune, "_TILE", 1)
    shape = adapt(tiny_llava(layers=1)).shape()
    features = torch.randn(200, shape.hidden_size)
    with counter() as operations:
        divprune.spread_out(features, torch.tensor([0]), [200], [1])
    # Each token is compared with itself, too.
    extra = 200 * shape.hidden_size
    assert operations.get_total_flops() == 2 * (DivPrune().flops(shape, 200, [(200, 1)]) + extra)
    # Later ones are no matrix products, which is all that torch counts.
    later = DivPrune().flops(shape, 200, [(200, 30)]) - DivPrune().flops(shape, 200, [(200, 1)])
    assert later == 29 * 200 * shape.hidden_size


@pytest.mark.parametrize("options", [{}, LLAVA_NEXT], ids=["llava", "llava-next"])
def test_vision_tower_and_projector_cost_what_their_operations_add_up_to(options: Any) -> None:
    """Of LLaVA-NeXT for each tile; laying them out costs nothing."""
    adapter = adapt(tiny_llava(layers=1, **options))
    patch = adapter.model.config.vision_config.patch_size
    processor = tiny_processor(patch_size=patch, pinpoints=options.get("pinpoints"))
    images = [
        processor(images=[Image.new("RGB", size)], text=["<image>"], return_tensors="pt")
        for size in ((64, 64), (20, 60))
    ]
    with torch.no_grad(), counter() as operations:
        adapter.encode_images(images)
    assert isinstance(adapter, TiledAdapter)
    tiles = sum(adapter.tiles(image)[0] for image in images)
    assert tiles == (5 + 3 if options else 2)
    shape = VisionShape.of_llava_config(adapter.model.config)
    counted = sum(adapter.vision_flops(image) for image in images)
    assert operations.get_total_flops() == 2 * (counted - tiles * _attention(shape))


def _attention(shape: VisionShape) -> int:
    """Of the tower for a picture, which torch does not count on a CPU."""
    return shape.layers_run * 2 * shape.tokens**2 * shape.hidden_size


def test_the_tower_of_llava_onevision_costs_what_its_operations_add_up_to() -> None:
    """For an image in tiles, and for two of a prompt that are seen once each."""
    adapter, processor = adapt(tiny_onevision(layers=1)), onevision_processor()
    pictures = [Image.new("RGB", size) for size in ((64, 64), (20, 60), (90, 90))]
    images = [
        image
        for own in (pictures[:1], pictures[1:])
        for image in adapter.process_images(processor, own)
    ]
    with torch.no_grad(), counter() as operations:
        adapter.encode_images(images)
    assert isinstance(adapter, TiledAdapter)
    tiles = [adapter.tiles(image)[0] for image in images]
    assert tiles == [5, 1, 1]
    shape = VisionShape.of_llava_config(adapter.model.config)
    counted = sum(adapter.vision_flops(image) for image in images)
    assert operations.get_total_flops() == 2 * (counted - 7 * _attention(shape))


@pytest.mark.parametrize(("strategy", "head"), [("default", False), ("full", True)])
def test_a_siglip_tower_costs_what_its_operations_add_up_to(strategy: Strategy, head: bool) -> None:
    """Without a class token; the head that it has by default is not run."""
    model = tiny_llava(layers=1, tower="siglip", strategy=strategy, vision_use_head=head)
    adapter = adapt(model)
    image = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    with torch.no_grad(), counter() as operations:
        adapter.encode_images([image])
    shape = VisionShape.of_llava_config(model.config)
    assert operations.get_total_flops() == 2 * (adapter.vision_flops(image) - _attention(shape))


@pytest.mark.parametrize(("options", "encoder"), [({}, "visionzip"), (LLAVA_NEXT, "scan")])
def test_a_reduction_costs_what_its_operations_add_up_to(
    options: dict[str, Any], encoder: str
) -> None:
    adapter = adapt(tiny_llava(layers=1, **options))
    sizes = {"image_sizes": torch.tensor([[64, 64]])} if options else {}
    tiles = 5 if options else 1
    pixels = torch.randn(1, *([5] if options else []), 3, 32, 32)
    shape = VisionShape.of_llava_config(adapter.model.config)
    keep = 8  # of each tile
    added = reduction(encoder).flops(shape.tower, keep)
    with torch.no_grad(), counter() as operations:
        adapter.encode_images([{"pixel_values": pixels, **sizes}], encoder, [tiles * keep])
    counted = shape.flops(projected=keep) + added - _attention(shape)
    assert operations.get_total_flops() == 2 * tiles * counted


def test_a_reduction_of_a_7b_shape_costs_little_of_what_the_projector_saves() -> None:
    shape = VisionShape.of_llava_config(blueprint("llava-1.5-7b").config)
    saved = shape.flops() - shape.flops(projected=64)
    assert saved == (576 - 64) * (1024 * 4096 + 4096 * 4096)
    assert 0.0005 < VisionZip().flops(shape.tower, 64) / saved < 0.001
    assert 0.006 < Scan().flops(shape.tower, 64) / saved < 0.01


def test_kv_bytes_are_those_of_the_tensors() -> None:
    shape = DecoderShape.of_config(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=128,
        )
    )
    assert shape.kv_bytes([10, 4], 2) == 2 * (10 + 4) * 2 * 8 * 2
