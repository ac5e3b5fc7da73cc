"""Counted cost against published figures and against counted operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.models import tiny_llava
from trio.models.attention import Packed
from trio.models.registry import adapt
from trio.pruning.cost import DecoderShape, VisionShape, layer_average
from trio.pruning.schedule import Schedule, tokens_per_layer

TEXT_TOKENS = 60


def llava_7b() -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's shape, without its weights."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
        image_token_index=32000,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_the_published_setting_on_a_7b_shape() -> None:
    adapter = adapt(llava_7b())
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
    for counted, expected in ((two, (5.244, 4.944, 4.026)), (shape, (5.219, 4.977, 4.209))):
        before, after = counted.prefill_flops(full), counted.prefill_flops(pruned)
        proxy = sum(counted.proxy_flops(count + TEXT_TOKENS, rows=4) for count in scored)
        vision = adapter.vision_flops(1)
        ratios = (
            before / after,
            before / (after + proxy),
            (before + vision) / (after + proxy + vision),
        )
        assert ratios == pytest.approx(expected, abs=1e-3)


def test_layers_cost_what_the_operations_add_up_to() -> None:
    """Torch counts two operations a multiply-add, and none in the attention kernel of a CPU."""
    model = tiny_llava(layers=3, kv_heads=2)
    decoder = adapt(model).decoder
    shape = adapt(model).shape()
    tokens = 40
    hidden = torch.randn(tokens, 32)
    with torch.no_grad(), decoder.ragged(), FlopCounterMode(display=False) as counter:
        rotary = decoder.rotary(torch.arange(tokens))
        decoder.run_layers(0, 3, hidden, rotary, Packed((tokens,)), None)
    attention = 3 * 2 * tokens**2 * shape.query_size
    assert counter.get_total_flops() == 2 * (shape.prefill_flops([tokens] * 3) - attention)


def test_the_proxy_costs_what_its_operations_add_up_to() -> None:
    model = tiny_llava(layers=3, kv_heads=2, vocab_size=80)
    decoder = adapt(model).decoder
    shape = adapt(model).shape()
    tokens, rows = 400, [395, 396, 397, 398]
    leaf = torch.randn(tokens, 32, requires_grad=True)
    proxy = decoder.proxy(1)
    with FlopCounterMode(display=False) as counter:
        logits = proxy.logits(leaf * 1.0, torch.arange(tokens), [rows], [tokens])
        torch.autograd.grad(logits.sum(), leaf)
    # The rows' own keys and values are computed once more by the layer and not used.
    extra = len(rows) * shape.hidden_size * shape.kv_size * 2
    counted = counter.get_total_flops() / 2
    assert counted == pytest.approx(shape.proxy_flops(tokens, len(rows)) + extra, rel=0.02)


def test_vision_tower_and_projector_cost_what_their_operations_add_up_to() -> None:
    model = tiny_llava(layers=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapt(model).encode_images([{"pixel_values": torch.zeros(1, 3, 32, 32)}])
    shape = VisionShape.of_llava_config(model.config)
    attention = shape.layers_run * 2 * shape.tokens**2 * shape.hidden_size
    assert counter.get_total_flops() == 2 * (shape.flops() - attention)


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
