"""The one place that says whether a tensor's work runs on a GPU, and how tensors get there.

All that takes another way on a GPU (kernels, tile sizes, no look at what is still being computed)
asks here, so that a count of launches, and tests, can take those ways on a CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_pretended = False


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether work on this tensor, or on this device, takes the ways made for a GPU."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cuda" or _pretended


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Makes it this thread's CUDA device, which Triton launches on whatever its tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Keeps scaled dot-product attention from cuDNN, which builds a plan for every new shape, in
    tenths of a second, and shapes change from batch to batch. Off CUDA nothing is done."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, cast there; the host does not wait for a copy from it to CUDA.

    Of a tensor on the host, which may change as soon as this returns.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # The allocator of pinned memory holds the copy until its stream has read it.
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


class Fetched:
    """A copy of tensors of one device for the host, on its way there; only reading it waits for
    CUDA."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tuple(map(_started, tensors))
        self._arrived: torch.cuda.Event | None = None
        devices = {x.device for x in tensors if x.is_cuda}
        if devices:
            (device,) = devices
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def read(self) -> tuple[Tensor, ...]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def _started(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
