"""Decoders whose tokens would be scored wrongly are refused when they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny.llava import tiny_llava
from tests.tiny.qwen2_5_vl import tiny_qwen
from tests.tiny.qwen3_vl import tiny_qwen3
from trio.benchmark.shapes.sizes import blueprint
from trio.errors import UserError
from trio.families.registry import adapt


class Wrapped(nn.Linear):
    """As quantised layers and adapters are, which stand where a plain projection was."""


class ShiftedNorm(nn.Module):
    """Multiplies by one more than its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.variance_epsilon)


class CentredNorm(ShiftedNorm):
    """Takes off the mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], 1 + self.weight)


class Rotary(nn.Module):
    """Without parameters."""


def replaced(attribute: str, made: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(decoder: Any) -> None:
        owner, _, name = attribute.rpartition(".")
        setattr(decoder.get_submodule(owner), name, made())

    return change


def half_turned(decoder: Any) -> None:
    decoder.rotary_emb.inv_freq = decoder.rotary_emb.inv_freq[:4]


def with_sinks(decoder: Any) -> None:
    decoder.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))


def without_keys(decoder: Any) -> None:
    del decoder.layers[0].self_attn.k_proj


def other_weights(decoder: Any) -> None:
    decoder.layers[1].self_attn.k_norm.weight = nn.Parameter(torch.ones(48))


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "wrapped key": (
        replaced("layers.1.self_attn.k_proj", lambda: Wrapped(64, 48)),
        r"layer 1\.self_attn\.k_proj is a Wrapped",
    ),
    "another projection": (
        replaced("layers.0.self_attn.gate", lambda: nn.Linear(64, 64)),
        r"layer 0\.self_attn has a gate \(Linear\)",
    ),
    "sinks": (with_sinks, r"layer 2\.self_attn has a parameter sinks"),
    "no keys": (without_keys, r"layer 0\.self_attn has no k_proj"),
    "layer norm": (
        replaced("layers.1.input_layernorm", lambda: nn.LayerNorm(64)),
        r"layer 1\.input_layernorm is a LayerNorm",
    ),
    "norm by one more": (
        replaced("layers.1.input_layernorm", lambda: ShiftedNorm(64)),
        r"layer 1\.input_layernorm, a ShiftedNorm, is no RMS norm times its weight",
    ),
    "centred norm": (replaced("norm", lambda: CentredNorm(64)), r"norm, a CentredNorm, is no RMS"),
    "shifted key norm": (
        replaced("layers.3.self_attn.k_norm", lambda: ShiftedNorm(24)),
        r"k_norm, a ShiftedNorm, is no RMS",
    ),
    "norm of all heads' keys": (other_weights, r"k_norm is of width \[48\] and not \[24\]"),
    "partial rotation": (half_turned, "8 of the 24 numbers of a head are rotated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_layers_are_refused(fault: str) -> None:
    model = tiny_qwen3(layers=4)
    change, message = FAULTS[fault]
    change(model.model.language_model)
    with pytest.raises(UserError, match=f"a Qwen3VLTextModel in which .*{message}.*merge adapters"):
        adapt(model)


def test_another_head_is_refused() -> None:
    model = tiny_qwen3(layers=1)
    model.lm_head = Wrapped(64, 80)
    with pytest.raises(UserError, match="the output head is a Wrapped"):
        adapt(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_layers_are_taken(dtype: torch.dtype) -> None:
    models = [tiny_llava(family=family) for family in ("llama", "mistral", "qwen2")]
    for model in (*models, tiny_qwen(), tiny_qwen3()):
        before = torch.random.get_rng_state()
        model.model.language_model.layers[0].self_attn.rotary_emb = Rotary()
        adapt(model.to(dtype))
        assert torch.equal(torch.random.get_rng_state(), before)


def test_models_without_weights_are_taken() -> None:
    for model in (blueprint("llava-1.5-7b"), blueprint("qwen3-vl-8b")):
        adapt(model)
