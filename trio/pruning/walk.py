"""One round of the suppression's walk on a GPU, so that nothing has to come to the host.

Shapes: N images, C candidates of a round.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def device_walk(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The walk for this device, or None where the host has to do it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return launch


def launch(near_NCC: Tensor, blocked_NC: Tensor, room_N: Tensor) -> Tensor:
    """Candidates taken `[N, C]`, bool.

    Args:
        near_NCC: whether two candidates suppress each other.
        blocked_NC: whether a candidate is suppressed already, or none.
        room_N: how many each image may still take.
    """
    from trio.pruning import walk_kernel

    images, candidates = blocked_NC.shape
    taken_NC = torch.empty_like(blocked_NC, dtype=torch.uint8)
    walk_kernel.walk[(images,)](
        near_NCC.contiguous().view(torch.uint8),
        blocked_NC.contiguous().view(torch.uint8),
        room_N,
        taken_NC,
        candidates,
        WIDTH=1 << (candidates - 1).bit_length(),
    )
    return taken_NC.view(torch.bool)
