"""What is put on a model after pruning took it is refused at the first prompt, never skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

import trio
from tests.engine.support import picture
from tests.patching.prompts import rows
from tests.tiny.llava import tiny_llava, tiny_processor
from trio.errors import UserError

PRUNING = trio.Pruning(schedule="1:20,2:6")
Change = Callable[[Any], object]


def lora(pattern: str) -> Change:
    config = LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)
    return lambda model: get_peft_model(model, config)


def replaced(path: str, made: Callable[[Any], Any]) -> Change:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, name, made(getattr(parent, name)))

    return change


def within(path: str, change: Change) -> Change:
    return lambda model: change(model.get_submodule(path))


LAYER = "model.language_model.layers.1"
CHANGES: dict[str, tuple[Change, str]] = {
    "lora": (lora(r".*language_model.*(q_proj|v_proj)"), "q_proj has become another"),
    "lora of the head": (lora("lm_head"), "lm_head has become another"),
    "tuned norms": (
        lambda model: get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"])),
        r"0\.input_layernorm has become another module \(peft",
    ),
    "quantised weight": (
        within(
            f"{LAYER}.self_attn.k_proj",
            lambda own: setattr(own, "weight", nn.Parameter(own.weight.to(torch.int8), False)),
        ),
        "k_proj.weight has become",
    ),
    "another layer": (replaced(LAYER, copy.deepcopy), r"layers\.1 has become another"),
    "another decoder": (
        replaced("model.language_model", copy.deepcopy),
        "language_model has become another",
    ),
    "hook on keys": (
        within(
            f"{LAYER}.self_attn.k_proj",
            lambda own: own.register_forward_hook(lambda _, args, out: out + 1),
        ),
        "k_proj has got a hook",
    ),
    "hook before a layer": (
        within(LAYER, lambda own: own.register_forward_pre_hook(lambda *_: None)),
        r"layers\.1 has got a hook",
    ),
    "another forward": (
        within(f"{LAYER}.self_attn.v_proj", lambda own: setattr(own, "forward", own.forward)),
        "v_proj has got .* another forward",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_comes_after_patch_is_refused(name: str) -> None:
    change, message = CHANGES[name]
    model = tiny_llava(layers=4)
    (inputs,) = rows(model, [1])
    trio.patch(model, PRUNING)
    model(**inputs, logits_to_keep=1)
    change(model)
    with pytest.raises(UserError, match=f"{message}.*unpatch.*merge_and_unload.*patch again"):
        model(**inputs, logits_to_keep=1)


@pytest.mark.parametrize("name", ["lora of the head", "hook on keys"])
def test_what_comes_after_an_engine_is_refused(name: str) -> None:
    change, message = CHANGES[name]
    model = tiny_llava(layers=4)
    engine = trio.Engine(model, tiny_processor(), pruning=PRUNING)
    change(model)
    with pytest.raises(UserError, match=f"{message}.*merge_and_unload"):
        list(engine.generate([trio.Request(prompt="what", images=(picture(1, (64, 64)),))]))


@pytest.mark.parametrize("pattern", [r".*language_model.*_proj", r".*vision_tower.*k_proj"])
def test_a_merged_adapter_and_one_of_the_tower_are_followed(pattern: str) -> None:
    """Both patched before the adapter comes and patched again."""
    model = tiny_llava(layers=4)
    (inputs,) = rows(model, [1])
    before = trio.patch(model, PRUNING)(**inputs, logits_to_keep=1).logits
    adapted: Any = lora(pattern)(model)
    if "vision" in pattern:
        apart = model(**inputs, logits_to_keep=1).logits
    else:
        apart = adapted.merge_and_unload()(**inputs, logits_to_keep=1).logits
        adapted = None
    merged = model if adapted is None else adapted.merge_and_unload()
    assert not torch.allclose(before, apart, atol=1e-3)
    again = trio.patch(merged, PRUNING)(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(again, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["hook on keys", "hook before a layer"])
def test_hooks_that_are_there_already_are_refused_too(name: str) -> None:
    model = tiny_llava(layers=4)
    CHANGES[name][0](model)
    with pytest.raises(UserError, match=r"hook.*not supported"):
        trio.patch(model, PRUNING)
