"""One round of the suppression's walk as a GPU kernel, so that nothing has to come to the host.

Decisions depend on those before them: one program goes through the candidates of one image, and
programs run beside each other. Triton comes with the CUDA builds of PyTorch.

Shapes: N images, C candidates of a round.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

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
    images, candidates = blocked_NC.shape
    taken_NC = torch.empty_like(blocked_NC, dtype=torch.uint8)
    _kernel()[(images,)](
        near_NCC.contiguous().view(torch.uint8),
        blocked_NC.contiguous().view(torch.uint8),
        room_N,
        taken_NC,
        candidates,
        WIDTH=1 << (candidates - 1).bit_length(),
    )
    return taken_NC.view(torch.bool)


@functools.cache
def _kernel() -> Any:
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

    @triton.jit
    def walk(near, blocked, room, taken, candidates, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        image = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, WIDTH)
        inside = place < candidates
        is_blocked = tl.load(blocked + image * candidates + place, mask=inside, other=1).to(
            tl.int32
        )
        is_taken = tl.zeros([WIDTH], dtype=tl.int32)
        left = tl.load(room + image).to(tl.int32)
        row = near + image * candidates * candidates
        for candidate in range(candidates):
            here = place == candidate
            free = 1 - tl.max(tl.where(here, is_blocked, 0), axis=0)
            takes = tl.where(left > 0, free, 0)
            suppressed = tl.load(row + candidate * candidates + place, mask=inside, other=0)
            is_blocked = is_blocked | (suppressed.to(tl.int32) * takes)
            is_taken = tl.where(here, takes, is_taken)
            left -= takes
        tl.store(taken + image * candidates + place, is_taken.to(tl.uint8), mask=inside)

    return walk
