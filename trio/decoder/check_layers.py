"""Checks that a decoder's layers are those whose gradient `LayerGradient` derives by hand.

It computes keys, values and their gradients from the weights of norms and projections, past the
modules that hold them. Of a layer that does more than that it would give wrong scores in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trio.decoder.unchanged import hooked
from trio.errors import UserError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_KNOWN = {*_PROJECTIONS, "q_norm", "k_norm"}


def check_layers(model: Any, lm_head: nn.Module) -> None:
    """Raise UserError unless layers, final norm and output head are of LLaMA's type.

    Args:
        model: a text decoder of transformers. Its norms are tried out, unless they are on the meta
            device.
        lm_head: its output head.
    """
    found = next(_faults(model, lm_head), None)
    if found is not None:
        raise UserError(
            f"a {type(model).__name__} in which {found} is not supported: tokens are scored by the "
            "weights of LLaMA-type layers, with plain projections, RMS norms and rotation of whole "
            "heads; merge adapters into the weights, load the model unquantised, or take another"
        )


def _faults(model: Any, lm_head: nn.Module) -> Iterator[str]:
    if type(lm_head) is not nn.Linear:
        yield f"the output head is a {_name(lm_head)}"
    if hooked(lm_head, leaving=True):
        yield "the output head has a hook"
    tried: set[type] = set()
    width = model.config.hidden_size
    for number, layer in enumerate(model.layers):
        where = f"layer {number}.self_attn"
        attention: Any = getattr(layer, "self_attn", None)
        if not hasattr(attention, "head_dim"):
            yield f"{where} is a {_name(attention)}"
        yield from _attention_faults(attention, where)
        yield from _hook_faults(layer, f"layer {number}")
        norm = getattr(layer, "input_layernorm", None)
        yield from _norm_faults(norm, f"layer {number}.input_layernorm", width, tried)
        if (norm := getattr(attention, "k_norm", None)) is not None:
            yield from _norm_faults(norm, f"{where}.k_norm", attention.head_dim, tried)
        yield from _rotary_faults(model, attention.head_dim)
    yield from _norm_faults(getattr(model, "norm", None), "norm", width, tried)


def _rotary_faults(model: Any, head: int) -> Iterator[str]:
    rotary = getattr(model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        yield f"rotary_emb is a {_name(rotary)}"
    elif 2 * len(frequencies) != head:
        yield f"{2 * len(frequencies)} of the {head} numbers of a head are rotated"


def _attention_faults(attention: nn.Module, where: str) -> Iterator[str]:
    for name, child in attention.named_children():
        rotates = "Rotary" in _name(child) and not list(child.parameters())
        if name not in _KNOWN and not rotates:
            yield f"{where} has a {name} ({_name(child)})"
    for name, _ in attention.named_parameters(recurse=False):
        yield f"{where} has a parameter {name}"
    for name in _PROJECTIONS:
        projection = getattr(attention, name, None)
        if projection is None:
            yield f"{where} has no {name}"
        elif type(projection) is not nn.Linear:
            yield f"{where}.{name} is a {_name(projection)}"


def _hook_faults(layer: Any, where: str) -> Iterator[str]:
    """Those of modules that are gone past, and of what comes before them."""
    attention = layer.self_attn
    for module in (layer, attention):
        if hooked(module, leaving=False):
            yield f"the {_name(module)} of {where} has a hook before it"
    for module in (layer.input_layernorm, attention.k_proj, attention.v_proj):
        if hooked(module, leaving=True):
            yield f"a {_name(module)} of {where} has a hook"


def _norm_faults(norm: Any, where: str, width: int, tried: set[type]) -> Iterator[str]:
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None:
        yield f"{where} is a {_name(norm)}"
    elif list(weight.shape) != [width]:
        yield f"{where} is of width {list(weight.shape)} and not [{width}]"
    elif type(norm) not in tried and not weight.is_meta:
        tried.add(type(norm))
        if not _is_rms_norm(norm, weight.detach(), epsilon):
            yield f"{where}, a {_name(norm)}, is no RMS norm times its weight"


@torch.no_grad()
def _is_rms_norm(norm: Any, weight: Tensor, epsilon: float) -> bool:
    """Whether it does to a vector, whose mean is not zero, what its weight and epsilon say."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(len(weight), generator=generator) + 0.5).to(weight.device)
    wanted = x * torch.rsqrt(x.square().mean() + epsilon) * weight.float()
    off = (norm(x[None])[0].float() - wanted).abs().max()
    return bool(off <= 1e-2 * wanted.abs().max())


def _name(module: Any) -> str:
    return type(module).__name__
