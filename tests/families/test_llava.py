"""The LLaVA adapter against the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
)

from tests.engine.support import (
    assert_lively,
    expected_tokens,
    lively_llava,
    mixed_requests,
    tokens,
)
from tests.tiny.llava import IMAGE_TOKEN_ID, Strategy, Tower, tiny_llava, tiny_processor
from trio.engine.engine import Engine
from trio.errors import UserError
from trio.families.registry import adapt

VISUAL = 64


def prompt(*parts: int | list[int]) -> list[int]:
    """Token ids; a number stands for that many images side by side."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN_ID] * (VISUAL * part) if isinstance(part, int) else part
    return ids


def inputs(pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """One mapping an image, as the engine hands them over."""
    return [{"pixel_values": image[None]} for image in pixels]


@pytest.mark.parametrize(
    ("tower", "strategy", "count"),
    [("clip", "full", VISUAL + 1), ("siglip", "default", VISUAL - 1)],
)
def test_towers_with_and_without_a_class_token(
    tower: Tower, strategy: Strategy, count: int
) -> None:
    """LLaVA-Interleave, for one, has a SigLIP tower with all its features."""
    model = lively_llava(family="qwen2", tower=tower, strategy=strategy)
    adapter = adapt(model)
    image = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    (features,) = adapter.encode_images([image])
    assert len(features) == adapter.max_visual_tokens == count
    assert adapter.visual_tokens(image) == [count]
    processor = tiny_processor(tower=tower, strategy=strategy)
    requests = mixed_requests(6)
    expected = expected_tokens(model, processor, requests)
    assert_lively(expected)
    assert tokens(Engine(model, processor, kv_bytes=1 << 24).generate(requests)) == expected


@pytest.mark.parametrize("layer", [-1, -2, 1, -4])
@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("siglip", "full")])
def test_features_are_the_models_own_and_no_layer_is_run_for_nobody(
    tower: Tower, strategy: Strategy, layer: int
) -> None:
    """Bit for bit."""
    model = tiny_llava(tower=tower, strategy=strategy, vision_use_head=True, layers=1)
    layers = model.model.vision_tower.encoder.layers
    model.config.vision_feature_layer = layer
    adapter, pixels = adapt(model), torch.randn(3, 3, 32, 32)
    run: list[int] = []
    for number, one in enumerate(layers):
        one.register_forward_hook(lambda *_, number=number: run.append(number))
    features = adapter.encode_images(inputs(pixels))
    assert run == list(range(layer % (len(layers) + 1)))
    with torch.no_grad():
        own = model.get_image_features(pixels, return_dict=True).pooler_output
    for image, wanted in zip(features, own, strict=True):
        assert torch.equal(image.tokens, wanted)


def test_a_tower_that_takes_pictures_of_any_size_is_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = PixtralVisionConfig(**sizes, intermediate_size=8, image_size=32, patch_size=8)
    text = LlamaConfig(**sizes, intermediate_size=8, vocab_size=80)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(UserError, match="over a 'pixtral' tower is not supported; supported are c"):
        adapt(model)


def test_spans_of_several_images() -> None:
    adapter = adapt(tiny_llava(layers=2))
    assert adapter.max_visual_tokens == VISUAL
    assert adapter.spans([5, 6, 7], []) == []
    assert adapter.spans(prompt([5], 1, [6]), [VISUAL]) == [(1, 65)]
    ids, counts = prompt([5], 2, [6], 1), [VISUAL] * 3
    assert adapter.spans(ids, counts) == [(1, 65), (65, 129), (130, 194)]
    assert adapter.spans(torch.tensor(ids), counts) == adapter.spans(ids, counts)
    assert adapter.spans(prompt([5], 1), [24, 40]) == [(1, 25), (25, 65)]


def test_mismatches_stop_with_both_numbers() -> None:
    adapter = adapt(tiny_llava(layers=2))
    with pytest.raises(UserError, match=r"65 image placeholder tokens .* 64 features"):
        adapter.spans([*prompt(1), IMAGE_TOKEN_ID], [VISUAL])
    with pytest.raises(UserError, match=r"64 image placeholder tokens .* 128 features"):
        adapter.spans(prompt(1), [VISUAL, VISUAL])
    with pytest.raises(UserError, match="not side by side"):
        adapter.spans([IMAGE_TOKEN_ID] * 32 + [5] + [IMAGE_TOKEN_ID] * 32, [VISUAL])
    features = adapter.encode_images(inputs(torch.zeros(1, 3, 32, 32)))
    with pytest.raises(UserError, match=r"128 image placeholder tokens .* 64 features"):
        adapter.embed(torch.tensor(prompt(2)), features)


def test_other_models_are_refused() -> None:
    tiny = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    with pytest.raises(UserError, match=r"'gpt2' are not supported; .* are llava, llava_next"):
        adapt(tiny)
    with pytest.raises(UserError, match="not supported"):
        adapt(tiny_llava(layers=1).model)


def test_a_sliding_window_bounds_the_prompt() -> None:
    assert adapt(tiny_llava(family="mistral", sliding_window=100)).decoder.max_positions == 100
    assert adapt(tiny_llava(family="mistral", sliding_window=None)).decoder.max_positions == 512
    assert adapt(tiny_llava(family="qwen2")).decoder.max_positions == 512


def test_rotation_that_depends_on_the_batch_is_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="'dynamic'"):
        adapt(tiny_llava(layers=1, rope_parameters=rope))


def test_shape_comes_from_the_config() -> None:
    adapter = adapt(tiny_llava(layers=3, kv_heads=2))
    shape = adapter.shape()
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads) == (3, 4, 2)
    assert (shape.hidden_size, shape.head_dim, shape.intermediate_size) == (32, 8, 64)
