"""Products by oneDNN on a CPU, which PyTorch brings and uses for float32 only where it compiles.

Measured on a CPU with AVX-512: in float32 it takes 0.6 to 0.9 of `F.linear`'s time, and with a
weight in a layout of oneDNN's own, few rows take half of it, in bfloat16 too. Weights of less than
`SMALL` elements gain nothing.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16
# For so many rows weights are laid out; more and fewer are as fast with that layout.
_ROWS = 16
_NEEDED = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have it for numbers of this kind."""
    mkldnn: Any = torch.backends.mkldnn
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _NEEDED):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weightᵀ + bias`, without a gradient.

    x: `[..., N, I]`. weight: `[O, I]`, or what `laid_out` has made of it. bias: `[O]`.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def product_plus(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`other + (x @ weightᵀ + bias)` in one operation, rounded once; see `product`."""
    binary = torch.ops.mkldnn._linear_pointwise.binary
    out: Tensor = binary(x, other, weight, bias, "add")
    return out


def laid_out(weight: Tensor) -> Tensor:
    """A copy of a weight `[O, I]` that only `product` can read, of the same size."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return out
