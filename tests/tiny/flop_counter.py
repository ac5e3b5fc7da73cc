"""Counting operations of PyTorch alike in all versions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter(more: Mapping[Any, Callable[..., int]] | None = None) -> FlopCounterMode:
    """Two operations a multiply-add, and none in a CPU's attention kernel, which 2.15 counts too.

    more: how to count operations that PyTorch passes over.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    nothing: dict[Any, Callable[..., int]] = {kernel: lambda *shapes, **_: 0}
    return FlopCounterMode(display=False, custom_mapping={**nothing, **(more or {})})
