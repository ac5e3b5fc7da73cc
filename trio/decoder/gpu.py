"""The one place that says whether a tensor's work runs on a GPU.

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


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory on the device, without waiting for what that is doing."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
