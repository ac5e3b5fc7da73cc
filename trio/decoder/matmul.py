"""Matrix products without a gradient by the weights, which may be narrower than activations.

Shapes: N rows, I inputs, O outputs; leading dimensions may come before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trio.decoder import onednn
from trio.decoder.gpu import on_gpu

# Elements of a weight that are widened at a time: what a processor's cache holds, elsewhere less.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ON_DEVICE = 1 << 18


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`, computed in the precision of `x`.

    Args:
        x: `[..., N, I]`.
        weight: `[..., I, O]`, of the same dtype or a narrower one.

    Returns:
        `[..., N, O]` in the dtype of `x`.
    """
    if weight.dtype == x.dtype:
        return onednn.product(x, weight.T) if _by_onednn(x, weight) else x @ weight
    if on_gpu(x) and weight.dtype == torch.bfloat16 and x.dtype == torch.float32:
        return _split_times(x, weight)
    return _widened_times(x, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Where PyTorch's own product, which goes through it in bfloat16, is slower."""
    large = weight.dim() == 2 and weight.numel() >= onednn.SMALL
    return large and x.dtype == torch.float32 and onednn.usable(x.device, x.dtype)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        if weight.dtype == x.dtype and _by_onednn(x, weight):
            return onednn.product(x, weight, bias)
        out = times(x, weight.transpose(-1, -2))
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return times(gradients[0], ctx.weight), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weightᵀ + bias` in the precision of `x`; no gradient goes to weight and bias.

    Args:
        x: `[..., N, I]`. weight: `[..., O, I]`. bias: `[..., O]`, added to every row.
    """
    out = _Linear.apply(x, weight, bias)
    assert isinstance(out, Tensor)
    return out


class through_linear(TorchFunctionMode):
    """Inside, linear layers use `linear` where that makes a difference: inputs may be of a wider
    dtype than weights, and float32 is fast on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1:
            x, weight = args[:2]
            if x.dtype != weight.dtype or _by_onednn(x, weight):
                rest = (*args[2:], *(kwargs or {}).values())
                return linear(x.flatten(0, -2), weight, *rest).unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))
