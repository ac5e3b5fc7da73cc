"""Models in memory whose weights cannot be read as they lie."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPTQConfig

import trio
from tests.tiny.llava import tiny_llava, tiny_processor
from trio.benchmark.shapes.sizes import blueprint
from trio.decoder.weights import check_weights
from trio.engine.engine import Engine
from trio.errors import UserError
from trio.families.registry import adapt


@pytest.fixture
def model() -> Any:
    return tiny_llava(layers=2)


def refusal(model: Any) -> str:
    """What all who take a model say of this one."""
    uses: list[Callable[[], object]] = [
        lambda: adapt(model),
        lambda: trio.patch(model, trio.Pruning(schedule="1:20")),
        lambda: Engine(model, tiny_processor()),
    ]
    said = set()
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        said.add(str(caught.value))
    (text,) = said
    assert "\n" not in text
    assert "forward" not in vars(model)
    return text


def projection(model: Any) -> Any:
    return model.model.language_model.layers[1].self_attn.k_proj


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers(model: Any, dtype: torch.dtype) -> None:
    linear = projection(model)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    text = refusal(model)
    assert f"model.language_model.layers.1.self_attn.k_proj.weight is {dtype}" in text


def test_packed_weights_without_a_config_of_them(model: Any) -> None:
    linear = projection(model)
    del linear.weight
    linear.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    assert "k_proj.qweight instead of a weight" in refusal(model)


def test_packed_weights(model: Any) -> None:
    model.lm_head = nn.Identity()
    model.lm_head.weight = lambda: torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"lm_head\.weight is packed"):
        check_weights(model)


class Scaled(Tensor):
    """As torchao wraps what lies quantised: it says that it is in float."""


def test_weights_of_a_class_of_their_own(model: Any) -> None:
    linear = projection(model)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scaled))
    assert "k_proj.weight is a Scaled" in refusal(model)


class Method(StrEnum):
    AWQ = "awq"


def test_what_transformers_has_quantised(model: Any) -> None:
    model.is_quantized = True
    assert "is quantised (unnamed method)" in refusal(model)
    model.quantization_method = Method.AWQ
    assert "is quantised (awq)" in refusal(model)
    settings = [
        (BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes, 4 bit"),
        (GPTQConfig(bits=3), "gptq, 3 bit"),
    ]
    for given, method in settings:
        model.hf_quantizer = SimpleNamespace(quantization_config=given)
        assert f"is quantised ({method})" in refusal(model)


def test_what_was_quantised_and_is_so_no_more(model: Any) -> None:
    """As `model.dequantize()` leaves a model."""
    model.is_quantized = False
    model.hf_quantizer = None
    assert adapt(model).model is model


@pytest.mark.parametrize("places", [{"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_a_model_spread_by_a_device_map(model: Any, places: dict[str, Any]) -> None:
    model.hf_device_map = places
    text = refusal(model)
    assert "not on one device (hf_device_map has " in text and "model.to(" in text
    assert all(str(place) in text for place in places.values())


def test_a_device_map_of_one_device(model: Any) -> None:
    model.hf_device_map = {"": 0}
    assert adapt(model).model is model


def test_a_part_on_the_meta_device(model: Any) -> None:
    model.model.language_model.layers[1].to("meta")
    assert "not on one device (cpu, meta)" in refusal(model)


def test_a_model_without_weights_is_measured_and_not_served() -> None:
    model = blueprint("llava-1.5-7b")
    assert adapt(model).max_visual_tokens == 576
    with pytest.raises(UserError, match="on the meta device, without weights"):
        Engine(model, tiny_processor())


def test_a_model_that_is_offloaded_whole() -> None:
    model = blueprint("llava-1.5-7b")
    model.model.language_model.layers[0].mlp._hf_hook = object()
    assert "offloaded by accelerate" in refusal(model)
