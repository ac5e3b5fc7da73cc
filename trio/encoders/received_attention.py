"""Recomputes, in forward hooks, the attention that each patch of a Qwen-VL tower receives.

Shapes: P patches of all images, S patches of a piece, in which each attends to each (an image or a
window of one), Q of them in a chunk of queries, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

_CHUNK = 1 << 24
"""Probabilities held at once, those of all heads: 64 MiB. An image of 16,384 tokens has 2^36."""


@contextmanager
def attention_received(modules: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Read the attention at some of a tower's attention modules.

    The kernels that the tower runs with keep no probabilities, so these are computed again, from
    what a module projects and the rotation that it is called with.

    Args:
        modules: attention modules with `qkv` in one projection, called with `position_embeddings`
            and, in `cu_seqlens`, the edges of the pieces.

    Yields:
        What the passes under this context fill: for each module, in the order in which they run,
        `[P]` in float32, the attention that a patch receives, summed over heads and averaged over
        the queries of its piece. Patches are in the tower's own order.
    """
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            reader = _Reader(module, found)
            hooks.enter_context(module.register_forward_pre_hook(reader.called, with_kwargs=True))
            hooks.enter_context(module.qkv.register_forward_hook(reader.projected))
        yield found


class _Reader:
    """Hooks of one attention module and of its projection."""

    def __init__(self, attention: Any, found: list[Tensor]) -> None:
        self.attention = attention
        self.found = found

    def called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rotary = kwargs["position_embeddings"]
        self.lengths = kwargs["cu_seqlens"].diff().tolist()

    def projected(self, module: nn.Module, args: Any, qkv: Tensor) -> None:
        query, key, _ = qkv.unflatten(-1, (3, self.attention.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *self.rotary)
        pieces = zip(query.split(self.lengths), key.split(self.lengths), strict=True)
        self.found.append(torch.cat([received(*piece, self.attention.scaling) for piece in pieces]))


def received(query_SHE: Tensor, key_SHE: Tensor, scale: float) -> Tensor:
    """Attention that each key receives, summed over heads and averaged over queries.

    Args:
        query_SHE: queries, as they attend.
        key_SHE: keys.
        scale: of the scores.

    Returns:
        `[S]` in float32; the sum is the number of heads.
    """
    length, heads, _ = key_SHE.shape
    query_HSE = query_SHE.float().transpose(0, 1) * scale
    key_HES = key_SHE.float().permute(1, 2, 0)
    received_S = key_HES.new_zeros(length)
    for query_HQE in query_HSE.split(max(1, _CHUNK // (heads * length)), dim=1):
        received_S += (query_HQE @ key_HES).softmax(dim=-1).sum(dim=(0, 1))
    return received_S / length
