"""Forward hooks on layers of a CLIP-like tower: hidden states, keys, the class token's attention.

The attention of one query, the class token's, is all that a reduction asks for. So the tower keeps
the fast attention that it was loaded with, which gives no weights, and the one row is done again.

Shapes: I images, S tokens of the tower (the class token, then P patches), H heads of size E, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Watched:
    """One encoder layer, after a forward of the tower.

    hidden_ISD: hidden states that leave it.
    """

    hidden_ISD: Tensor

    def __init__(self, layer: Any) -> None:
        self._attention = layer.self_attn
        self._query_IX: Tensor
        self._key_ISX: Tensor

    def class_attention(self) -> Tensor:
        """Attention of the class token to the patches, after the softmax over all tokens and summed
        over the heads: `[I, P]`, float32."""
        query_IHE = self._by_head(self._query_IX)
        key_ISHE = self._by_head(self._key_ISX)
        scores_IHS = torch.einsum("ihe,ishe->ihs", query_IHE, key_ISHE) * self._attention.scale
        return scores_IHS.softmax(dim=-1).sum(dim=1)[:, 1:]

    def mean_keys(self) -> Tensor:
        """Mean of the heads' keys, with bias and unscaled: `[I, S, E]`, float32."""
        return self._by_head(self._key_ISX).mean(dim=2)

    def _by_head(self, projected: Tensor) -> Tensor:
        heads = (self._attention.num_heads, self._attention.head_dim)
        return projected.float().unflatten(-1, heads)

    def _see_query(self, module: Any, args: Any, output: Tensor) -> None:
        self._query_IX = output[:, 0].clone()

    def _see_keys(self, module: Any, args: Any, output: Tensor) -> None:
        self._key_ISX = output

    def _see_hidden(self, module: Any, args: Any, output: Tensor) -> None:
        self.hidden_ISD = output


@contextmanager
def watched(tower: Any, indices: Iterable[int]) -> Iterator[dict[int, Watched]]:
    """See what these layers do, counted from 0, in forwards of a CLIP tower (`encoder.layers`).

    Each has three hooks of its own as long as the context lasts, on this instance alone.

    Yields:
        By index, the layers; to be read once the tower has run.
    """
    handles = []
    seen = {}
    try:
        for index in sorted({*indices}):
            layer = tower.encoder.layers[index]
            own = seen[index] = Watched(layer)
            handles.append(layer.self_attn.q_proj.register_forward_hook(own._see_query))
            handles.append(layer.self_attn.k_proj.register_forward_hook(own._see_keys))
            handles.append(layer.register_forward_hook(own._see_hidden))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
