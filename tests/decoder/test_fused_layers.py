"""When layers run fused, and that copies of weights are never old."""

from __future__ import annotations

import gc
import subprocess
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny.llava import tiny_llava
from trio import cgroups
from trio.decoder import onednn
from trio.decoder.attention import Packed
from trio.decoder.decoder import Decoder
from trio.decoder.fused.fused_layer import OnCPU
from trio.decoder.fused.side_by_side import SideBySide

TOKENS = 5


def decoder_of(model: Any) -> Decoder:
    return Decoder(model.model.language_model, model.lm_head)


def run(decoder: Decoder) -> Tensor:
    """Logits of some hidden states."""
    hidden_TD = torch.randn(
        TOKENS, decoder.hidden_size, generator=torch.Generator().manual_seed(3)
    ).to(decoder.dtype)
    with torch.no_grad(), decoder.ragged():
        rotary = decoder.rotary(torch.arange(TOKENS))
        layers = decoder.num_layers
        return decoder.head(
            decoder.run_layers(0, layers, hidden_TD, rotary, Packed((TOKENS,)), None)
        )


def copied(products: Sequence[SideBySide]) -> int:
    """Bytes of weights that are held as copies."""
    return sum(one._copy.weight.nbytes for one in products if one._copy is not None)


def fused(model: Any) -> Decoder:
    decoder = decoder_of(model)
    decoder.fuse()
    assert decoder.fused
    run(decoder)
    return decoder


def equal(decoder: Decoder, model: Any) -> None:
    torch.testing.assert_close(run(decoder), run(decoder_of(model)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def scaled(weight: Tensor) -> None:
    weight.mul_(1.5)


def scaled_past_the_count(weight: Tensor) -> None:
    weight.data[1, 2] += 1


EDITS: dict[str, Callable[[nn.Linear], None]] = {
    "in place": lambda linear: scaled(linear.weight),
    "one number past the count": lambda linear: scaled_past_the_count(linear.weight),
    "another storage": lambda linear: setattr(linear.weight, "data", linear.weight.data * 1.5),
    "another parameter": lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight * 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj", "head"])
def test_edited_weights_are_followed(name: str, edit: str, dtype: torch.dtype) -> None:
    """Both large ones, in oneDNN's layout, and small ones."""
    model = tiny_llava(layers=2, hidden=288, heads=4, kv_heads=4, dtype=dtype)
    decoder = fused(model)
    before = run(decoder)
    linear = model.lm_head if name == "head" else decoder.model.get_submodule(name)
    EDITS[edit](linear)
    if "past" in edit:
        decoder.check_copies()
    after = run(decoder)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, run(decoder_of(model)), atol=1e-4, rtol=2e-2)


def test_a_hook_sees_what_it_would_see_of_the_modules() -> None:
    model = tiny_llava(layers=2)
    decoder, seen = fused(model), []
    hook = decoder.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    equal(decoder, model)
    assert len(seen) == 2  # of either decoder
    hook.remove()
    equal(decoder, model)


def test_without_memory_the_weights_themselves_are_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cgroups, "free_main_memory", lambda: 1000)
    model = tiny_llava(layers=2)
    decoder = fused(model)
    assert "would take 0.0 GB of 0.0 GB that are free" in caplog.text
    scaled_past_the_count(model.lm_head.weight)
    equal(decoder, model)


def test_without_onednn_products_are_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onednn, "usable", lambda device, dtype: False)
    model = tiny_llava(layers=2, hidden=288, heads=4, kv_heads=4)
    equal(fused(model), model)
    assert "no oneDNN for torch.float32" in caplog.text


def test_layers_that_do_something_else_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llava(layers=2)
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    decoder = decoder_of(model)
    decoder.fuse()
    assert not decoder.fused and "its MLP is a LlamaMLP" in caplog.text
    equal(decoder, model)


def test_layers_that_give_other_numbers_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llava(layers=2)
    kind = type(model.model.language_model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    decoder = decoder_of(model)
    decoder.fuse()
    assert not decoder.fused and "layer 0 gives numbers that differ" in caplog.text
    equal(decoder, model)


def test_float64_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    decoder = decoder_of(tiny_llava(layers=2).double())
    decoder.fuse()
    assert not decoder.fused and not caplog.text
    run(decoder)


def test_copies_are_shared_and_go_with_the_model() -> None:
    model = tiny_llava(layers=2)
    first, second = fused(model), fused(model)
    assert first._fused is second._fused
    model.model.language_model.layers[1].mlp.down_proj = nn.Linear(64, 32, bias=False)
    third = fused(model)
    assert third._fused is not first._fused
    equal(third, model)
    text = weakref.ref(model.model.language_model)
    del model, first, second, third
    gc.collect()
    assert text() is None


def test_layers_that_cannot_be_tried_run_as_they_are_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> Tensor:
        raise subprocess.CalledProcessError(1, ["cc", "launcher.c"])

    def hooked(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda *_: None)

    def broken(layer: Any) -> None:
        layer.mlp.down_proj.weight.data[0, 0] = torch.nan

    for spoil, line in (
        (hooked, "all layers like layer 0 have hooks"),
        (broken, "layer 0 gives numbers that are not finite"),
        (lambda _: monkeypatch.setattr(OnCPU, "__call__", fails), "fails: CalledProcessError"),
    ):
        model = tiny_llava(layers=2)
        for layer in model.model.language_model.layers:
            spoil(layer)
        decoder = decoder_of(model)
        decoder.fuse()
        assert not decoder.fused and len(caplog.messages) == 1 and line in caplog.text
        caplog.clear()


def test_copies_are_given_back_and_made_anew() -> None:
    model = tiny_llava(layers=2)
    decoder = fused(model)
    assert decoder._fused is not None
    products = decoder._fused._products
    held = copied(products)
    decoder.drop_copies()
    assert held > 0 == copied(products)
    equal(decoder, model)
    assert copied(products) == held


@pytest.mark.parametrize("look", ["check_copies", "fuse"])
def test_weights_that_moved_are_not_held(look: str) -> None:
    """As `model.to("cuda")` moves them, whichever decoder of the model looks first."""
    model = tiny_llava(layers=2)
    decoder = fused(model)
    assert decoder._fused is not None
    products = decoder._fused._products
    model.to(torch.bfloat16)
    if look == "fuse":
        decoder_of(model).fuse()
    else:
        decoder.check_copies()
    assert copied(products) == 0
