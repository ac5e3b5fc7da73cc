"""Attention from a prompt's last token to all of its tokens, in one decoder layer.

FastV (arXiv 2403.06764), method section, ranks visual tokens by it. The layer has run by then, but
its keys are worked out once more from what entered it: a prefill need not have a cache, and one
that has keeps it in the shape that its owner wants.

Shapes: T packed tokens, R last rows, one of each sequence; in a group of neighbours N of them with
S tokens each, padded; D hidden size, K key/value heads, G query heads of each, H = K * G, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trio.decoder.decoder import Decoder
from trio.decoder.gpu import sent
from trio.decoder.matmul import through_linear
from trio.pruning.scores.tiled_attention import (
    Group,
    Keys,
    group_sequences,
    rotated_half,
    tile_tokens,
)


@torch.no_grad()
def last_attention(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    positions_T: Tensor,
    lengths: Sequence[int],
) -> Tensor:
    """Attention of each sequence's last token to all of its own, averaged over heads.

    In float32 whatever the model's dtype, float64 models in float64.

    Args:
        decoder: the model's decoder.
        layer: index of the layer.
        hidden_TD: hidden states that enter it, packed, any floating dtype.
        positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
        lengths: tokens of each sequence.

    Returns:
        `[T]`, which sums to 1 over each sequence.
    """
    dtype = torch.promote_types(decoder.dtype, torch.float32)
    tokens = tile_tokens(decoder)
    own: Any = decoder.model.layers[layer]
    cos, sin = decoder.rotary(positions_T, dtype)
    keys = Keys(own, hidden_TD, cos[0], sin[0], dtype, tokens)
    rows = [[length - 1] for length in lengths]
    groups = group_sequences(rows, lengths, [(0, length) for length in lengths], tokens)
    layout = _LastRows(keys, groups, hidden_TD.new_empty(len(hidden_TD), dtype=dtype))
    last_R = sent(torch.tensor([end - 1 for end in accumulate(lengths)]), hidden_TD.device)
    with decoder.ragged(), through_linear():
        # The layer's own code makes the queries: norms and rotation differ between families.
        own.self_attn(
            own.input_layernorm(hidden_TD[last_R].to(dtype))[None],
            position_embeddings=(cos[:, last_R], sin[:, last_R]),
            attention_mask=None,
            layout=layout,
        )
    return layout.attention_T


class _LastRows:
    """As the attention of a layer: notes what the rows' queries attend to."""

    def __init__(self, keys: Keys, groups: Sequence[Group], attention_T: Tensor) -> None:
        self._keys = keys
        self._groups = groups
        self.attention_T = attention_T

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, R, E]` to `[1, R, H, E]`, which nobody wants: the queries as they are."""
        query_RKGE = self._keys.by_head(query, scale)
        for group in self._groups:
            first = group.first_row
            query_NKGE = query_RKGE[first : first + len(group.rows)]
            share_NKGS = self._keys.shares(group, query_NKGE, rotated_half(query_NKGE))
            self._keys.spread(self.attention_T, group, 0, share_NKGS.mean(dim=(1, 2)))
        return query.transpose(1, 2)
