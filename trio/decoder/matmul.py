"""Matrix products: few rows with large weights, and activations wider than the weights.

Shapes: N rows, I inputs, O outputs; leading dimensions may come before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trio.decoder.gpu import on_gpu

# Elements of a weight that are widened at a time: what a processor's cache holds, elsewhere less.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ON_DEVICE = 1 << 18
# Measured on CPUs, in float32: with few rows, a batch of products with slices of the weight is 1.3
# to 2 times as fast as one product. Rows up to which that holds, and slices; heads (one side of the
# weight many times the other) take more of both.
_FEW_ROWS, _SLICES = 64, 4
_FEW_ROWS_OF_HEAD, _SLICES_OF_HEAD = 256, 16
_SMALL = 1 << 16


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`, computed in the precision of `x`.

    Args:
        x: `[..., N, I]`.
        weight: `[..., I, O]`, of the same dtype or a narrower one.

    Returns:
        `[..., N, O]` in the dtype of `x`.
    """
    if weight.dtype == x.dtype:
        return _sliced_times(x, weight)
    if on_gpu(x) and weight.dtype == torch.bfloat16 and x.dtype == torch.float32:
        return _split_times(x, weight)
    return _widened_times(x, weight)


def _widened_times(x: Tensor, weight: Tensor) -> Tensor:
    inputs, outputs = weight.shape[-2:]
    elements = _BLOCK.get(x.device.type, _BLOCK_ON_DEVICE)
    step = max(1, elements * max(inputs, outputs) // weight.numel())
    if inputs > outputs:
        out = x.new_zeros((*x.shape[:-1], outputs))
        for start in range(0, inputs, step):
            part = slice(start, start + step)
            out += x[..., part] @ weight[..., part, :].to(x.dtype)
        return out
    out = x.new_empty((*x.shape[:-1], outputs))
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        out[..., part] = x @ weight[..., part].to(x.dtype)
    return out


def _sliced_times(x: Tensor, weight: Tensor) -> Tensor:
    inputs, outputs = weight.shape[-2:]
    is_head = max(inputs, outputs) >= 8 * min(inputs, outputs)
    most_rows = _FEW_ROWS_OF_HEAD if is_head else _FEW_ROWS
    slices = _SLICES_OF_HEAD if is_head else _SLICES
    deep = is_head and inputs > outputs
    plain = on_gpu(x) or x.dtype != torch.float32 or weight.numel() < _SMALL
    if plain or x.dim() != 2 or len(x) > most_rows or (inputs if deep else outputs) % slices:
        return x @ weight
    if deep:
        parts = x.unflatten(1, (slices, -1)).transpose(0, 1)
        return torch.bmm(parts, weight.unflatten(0, (slices, -1))).sum(dim=0)
    parts = weight.unflatten(1, (slices, -1)).transpose(0, 1)
    return torch.bmm(x.expand(slices, *x.shape), parts).transpose(0, 1).flatten(1)


def _split_times(x: Tensor, weight: Tensor) -> Tensor:
    """On tensor cores: a bfloat16 and the bfloat16 of its rest hold 16 bits of each activation, the
    weights are exact, and sums are kept in float32. Both go through one product, which reads the
    weights once."""
    halves = x.new_empty((*x.shape[:-2], 2, *x.shape[-2:]), dtype=torch.bfloat16)
    high, low = halves.unbind(-3)
    torch.sub(x, high.copy_(x), out=low)
    product = torch.mm if weight.dim() == x.dim() == 2 else torch.bmm
    out = product(halves.flatten(-3, -2), weight, out_dtype=torch.float32)
    high, low = out.unflatten(-2, (2, -1)).unbind(-3)
    return high + low


class _Linear(torch.autograd.Function):
    """Gradients go to the activations only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return times(x, weight.transpose(-1, -2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return times(gradients[0], ctx.weight), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weightᵀ + bias` in the precision of `x`; no gradient goes to weight and bias.

    Args:
        x: `[..., N, I]`. weight: `[..., O, I]`. bias: `[..., O]`, added to every row.
    """
    out = _Linear.apply(x, weight)
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias.detach()


class few_row_linears(TorchFunctionMode):
    """Inside, linear layers use `linear`: few rows are fast, inputs may be of a wider dtype than
    weights, and no gradient goes to weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1:
            x, weight = args[:2]
            if not on_gpu(x) or x.dtype != weight.dtype:
                rest = (*args[2:], *(kwargs or {}).values())
                return linear(x.flatten(0, -2), weight, *rest).unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))
