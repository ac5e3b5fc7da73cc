"""Forward hooks on layers of a CLIP-like tower: hidden states, keys, the class token's attention.

No more of a tower is run than the layers that are asked for: most models take the output of the
last but one, and what is behind it would be computed for nobody.

The attention of one query, the class token's, is all that a reduction asks for. So the tower keeps
the fast attention that it was loaded with, which gives no weights, and the one row is done again.

Shapes: I images, S tokens of the tower (the class token, then P patches), H heads of size E, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any

import torch
from torch import Tensor


class _DeepEnough(Exception):
    """Leaves a tower's forward."""


class Watched:
    """One encoder layer, after a forward of the tower."""

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


@contextmanager
def watched(tower: Any, indices: Iterable[int]) -> Iterator[dict[int, Watched]]:
    """See what these layers do, counted from 0, in forwards of a CLIP tower (`encoder.layers`).

    Each has two hooks of its own as long as the context lasts, on this instance alone.

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
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(tower: Any, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Runs a tower as far as the deepest of some layers (`encoder.layers`).

    Args:
        pixels: `[I, 3, height, width]`, as the tower takes them.
        layers: counted from 0; -1 stands for what enters the first.

    Returns:
        `[I, S, D]` each, the hidden states that leave these layers. The forward is the tower's own,
        left by an exception; forwards in other threads see nothing of that.
    """
    found: dict[int, Tensor] = {}
    caller, deepest = get_ident(), max(layers)

    def see(layer: int, states: Tensor) -> None:
        if get_ident() == caller:
            found[layer] = states
            if layer == deepest:
                raise _DeepEnough

    blocks, handles = tower.encoder.layers, []
    try:
        for layer in {*layers}:
            if layer < 0:
                hook = blocks[0].register_forward_pre_hook(lambda _, args: see(-1, args[0]))
            else:
                hook = blocks[layer].register_forward_hook(
                    lambda _, __, output, layer=layer: see(layer, output)
                )
            handles.append(hook)
        with suppress(_DeepEnough):
            tower(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in layers]
