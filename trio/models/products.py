"""Products of few rows with large weights, and of activations in a wider precision than weights.

Shapes: N rows, I inputs, O outputs; leading dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Elements of a weight that are widened at a time.
_BLOCK = 1 << 18
# Measured on CPUs: with up to this many rows, a product with an output head (one side of the weight
# many times the other) is up to twice as fast as a batch of products with its slices.
_FEW_ROWS = 256
_SLICES = (16, 8, 4, 2)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`, computed in the precision of `x`.

    Args:
        x: `[..., N, I]`.
        weight: `[..., I, O]`, of the same dtype or a narrower one.

    Returns:
        `[..., N, O]` in the dtype of `x`.
    """
    if weight.dtype == x.dtype:
        return _sliced_times(x, weight) if _is_head(x, weight) else x @ weight
    if x.is_cuda and weight.dtype == torch.bfloat16 and x.dtype == torch.float32:
        return _split_times(x, weight)
    outputs = weight.shape[-1]
    step = max(1, _BLOCK * outputs // weight.numel())
    out = x.new_empty((*x.shape[:-1], outputs))
    for start in range(0, outputs, step):
        block = weight[..., start : start + step]
        out[..., start : start + step] = x @ block.to(x.dtype)
    return out


def _is_head(x: Tensor, weight: Tensor) -> bool:
    if x.dim() != 2 or weight.dim() != 2 or x.device.type != "cpu" or len(x) > _FEW_ROWS:
        return False
    return max(weight.shape) >= 8 * min(weight.shape)


def _sliced_times(x: Tensor, weight: Tensor) -> Tensor:
    inputs, outputs = weight.shape
    slices = next((n for n in _SLICES if max(inputs, outputs) % n == 0), 1)
    if outputs > inputs:
        parts = torch.bmm(
            x.expand(slices, *x.shape), weight.unflatten(1, (slices, -1)).transpose(0, 1)
        )
        return parts.transpose(0, 1).flatten(1)
    parts = torch.bmm(
        x.unflatten(1, (slices, -1)).transpose(0, 1), weight.unflatten(0, (slices, -1))
    )
    return parts.sum(dim=0)


def _split_times(x: Tensor, weight: Tensor) -> Tensor:
    """On tensor cores: a bfloat16 and the bfloat16 of its rest hold 16 bits of each activation, the
    weights are exact, and sums are kept in float32."""
    high = x.bfloat16()
    low = (x - high).bfloat16()
    product = torch.mm if weight.dim() == x.dim() == 2 else torch.bmm
    out = product(high, weight, out_dtype=torch.float32)
    return out.add_(product(low, weight, out_dtype=torch.float32))


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


class _WideLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[0].dtype != args[1].dtype:
            return linear(args[0].flatten(0, -2), *args[1:], **(kwargs or {})).unflatten(
                0, args[0].shape[:-1]
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def wide_linears() -> Iterator[None]:
    """Inside, linear layers take inputs of a wider dtype than their weights have."""
    with _WideLinears():
        yield
