"""What is seen of a tower's layers, against what transformers itself returns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.tiny.llava import randomise
from trio.encoders.clip_hooks import hidden_states, watched

LAYERS, HEADS = 4, 3


def tower(attention: str = "sdpa") -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 20,
        "patch_size": 4,
        "attn_implementation": attention,
    }
    config = CLIPVisionConfig(**sizes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = CLIPVisionModel(config).eval()
        randomise(model, 0.4, bias_spread=0.1)
    return model


def pixels() -> Tensor:
    return torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def hooks(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_and_keys_are_those_of_transformers(attention: str) -> None:
    plain = tower("eager")(pixels(), output_attentions=True, output_hidden_states=True)
    model = tower(attention)
    with watched(model, [2, 1]) as seen:
        model(pixels())
    assert sorted(seen) == [1, 2]
    for index, layer in seen.items():
        weights = plain.attentions[index]
        assert weights.shape == (3, HEADS, 26, 26)
        expected = weights.sum(dim=1)[:, 0, 1:]
        assert expected.std() > 0.01  # of no use if attention were flat
        torch.testing.assert_close(layer.class_attention(), expected, atol=5e-6, rtol=5e-5)
        entering = model.encoder.layers[index].layer_norm1(plain.hidden_states[index])
        keys = model.encoder.layers[index].self_attn.k_proj(entering)
        mean = keys.view(3, 26, HEADS, 8).mean(dim=2)
        torch.testing.assert_close(layer.mean_keys(), mean, atol=5e-5, rtol=5e-5)


@torch.no_grad()
def test_the_tower_keeps_its_attention_and_no_hook_stays() -> None:
    model = tower()
    plain = model(pixels()).last_hidden_state
    weighed = []
    attention = model.encoder.layers[1].self_attn
    own = attention.register_forward_hook(lambda *call: weighed.append(call[2][1]))
    before = hooks(model)
    with watched(model, [1, 1, 3]):
        assert hooks(model) == before + 2 * 2
        result = model(pixels()).last_hidden_state
    assert hooks(model) == before
    own.remove()
    assert weighed == [None]  # sdpa returns no weights
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(result, plain)


def test_hooks_go_when_the_forward_or_the_hooking_fails() -> None:
    model = tower()
    with pytest.raises(ValueError), watched(model, [0, 2]):
        model(torch.zeros(1, 3, 7, 7))
    assert hooks(model) == 0
    with pytest.raises(IndexError), watched(model, [0, LAYERS]):
        pass
    assert hooks(model) == 0


@torch.no_grad()
def test_other_towers_are_not_watched() -> None:
    model, other = tower(), tower()
    with watched(model, [1]) as seen:
        other(pixels())
        assert hooks(other) == 0
    assert not hasattr(seen[1], "_key_ISX")


@torch.no_grad()
def test_half_precision_is_weighed_in_single() -> None:
    model = tower().bfloat16()
    with watched(model, [2]) as seen:
        model(pixels().bfloat16())
    attention = seen[2].class_attention()
    assert attention.dtype == seen[2].mean_keys().dtype == torch.float32
    assert attention.unique().numel() == attention.numel()


def layers_run(model: Any) -> list[int]:
    """Filled by forwards of it: the layers that were computed."""
    run: list[int] = []
    for number, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    return run


@pytest.mark.parametrize("layers", [[2], [3], [-1], [0, 2], [2, -1, 1]])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers_and_no_layer_behind_them_is_run(
    layers: list[int],
) -> None:
    model = tower()
    plain = model(pixels(), output_hidden_states=True)
    run = layers_run(model)
    before = hooks(model)
    found = hidden_states(model, pixels(), layers)
    assert hooks(model) == before
    assert run == list(range(max(layers) + 1))
    for layer, states in zip(layers, found, strict=True):
        assert torch.equal(states, plain.hidden_states[layer + 1])
    assert torch.equal(model(pixels()).last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_other_threads_run_the_whole_tower_meanwhile() -> None:
    model = tower()
    whole = model(pixels()).last_hidden_state
    with ThreadPoolExecutor(1) as other:
        seen: list[Tensor] = []

        def enter(*_: Any) -> None:
            if not seen:
                seen.append(whole)
                with torch.no_grad():
                    seen[0] = other.submit(model, pixels()).result(timeout=60).last_hidden_state

        model.encoder.layers[0].register_forward_pre_hook(enter)
        hidden_states(model, pixels(), [1])
    assert torch.equal(seen[0], whole) and seen[0] is not whole


def test_a_fault_in_the_tower_is_no_early_end() -> None:
    model = tower()
    with pytest.raises(ValueError):
        hidden_states(model, torch.zeros(1, 3, 7, 7), [1])
    with pytest.raises(IndexError):
        hidden_states(model, pixels(), [0, LAYERS])
    assert hooks(model) == 0
