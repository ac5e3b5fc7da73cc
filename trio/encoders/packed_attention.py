"""Attention of a Qwen-VL tower in one call for all windows of all images.

Transformers hands a tower's windows over together only to FlashAttention, and calls any other
attention once for each: thousands of calls for one image. The function here is registered under a
name that it takes for FlashAttention's.

Shapes: P patches of all images, W windows of one size S, H heads, E head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

NAME = "trio_flash_windows"
_log = logging.getLogger(__name__)


@contextmanager
def packed(tower: Any) -> Iterator[None]:
    """Forwards of a tower that attends by `sdpa` do so in one call a block; its config is restored
    afterwards. A tower that was told to attend otherwise is left alone."""
    config, before = tower.config, tower.config._attn_implementation
    if before != "sdpa":
        if "flash" not in before:
            _say_unpacked(f"its attention is set to {before!r}")
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def window_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within windows, in which each patch attends to all.

    Args:
        query, key, value: `[1, H, P, E]`.
        cu_seq_lens_q: int32, the windows' edges; None: transformers calls once for each window.
        max_length_q: patches of the largest window.

    Returns:
        `[1, P, H, E]` and None (no attention weights).
    """
    if cu_seq_lens_q is None:
        _say_unpacked("this version of transformers calls attention window by window")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        edges, longest = cu_seq_lens_q, int(max_length_q or cu_seq_lens_q.diff().max())
        out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scaling)
        assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for
        return out[None], None
    return _by_size(query, key, value, scaling, _on_host(cu_seq_lens_q)), None


@lru_cache(maxsize=8)
def _on_host(edges: Tensor) -> tuple[int, ...]:
    """Read once for all blocks, which get the same tensor, known by its identity."""
    return tuple(edges.tolist())


def _by_size(
    query: Tensor, key: Tensor, value: Tensor, scale: float, edges: tuple[int, ...]
) -> Tensor:
    """One call for all windows of a size."""
    out = query.new_empty(query.transpose(1, 2).shape)
    for size, place in _places(edges, query.device):
        q, k, v = (
            x[0, :, place].unflatten(1, (-1, size)).transpose(0, 1) for x in (query, key, value)
        )
        done_WHSE = F.scaled_dot_product_attention(q, k, v, scale=scale)
        out[0, place] = done_WHSE.transpose(1, 2).flatten(0, 1)
    return out


@lru_cache(maxsize=8)  # two for each forward: within windows, and to whole images
def _places(edges: tuple[int, ...], device: torch.device) -> list[tuple[int, Tensor | slice]]:
    """Each size of windows, and where the patches of all of that size are: a slice where these
    windows are neighbours."""
    starts: dict[int, list[int]] = {}
    for start, stop in pairwise(edges):
        starts.setdefault(stop - start, []).append(start)
    places: list[tuple[int, Tensor | slice]] = []
    for size, own in starts.items():
        stop = own[0] + size * len(own)
        if own == [*range(own[0], stop, size)]:
            places.append((size, slice(own[0], stop)))
        else:
            patch_WS = torch.tensor(own)[:, None] + torch.arange(size)
            places.append((size, patch_WS.flatten().to(device)))
    return places


@cache
def _say_unpacked(why: str) -> None:
    """Once in a process."""
    _log.warning("a vision tower's windows are attended to one by one, which is slow: %s", why)


AttentionInterface.register(NAME, window_attention)
