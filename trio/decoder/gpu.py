"""The one place that says whether a tensor's work runs on a GPU, and how tensors get there.

All that takes another way on a GPU (kernels, tile sizes, no look at what is still being computed)
asks here, so that a count of launches, and tests, can take those ways on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_pretended = False


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether work on this tensor, or on this device, takes the ways made for a GPU."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cuda" or _pretended


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, cast there; the host does not wait for a copy from it to CUDA.

    Of a tensor on the host, which may change as soon as this returns.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # The allocator of pinned memory holds the copy until its stream has read it.
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
