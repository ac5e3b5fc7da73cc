"""Prompts that begin alike, as several questions on one image do: their common tokens pass the
first layers once.

Attention is causal, so what the layers make of the first tokens of a prompt does not depend on the
text behind them. That holds up to the first pruning stage, which looks at the whole prompt.

Shapes: T packed tokens, F of them those of followers behind their prefixes, P tokens of a prefix, K
key/value heads, E head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.decoder.attention import Packed
from trio.decoder.decoder import Decoder, LayerCache, Rotary
from trio.decoder.gpu import sent


@dataclass(slots=True, eq=False)
class PrefixStates:
    """What the first layers make of the tokens with which prompts begin."""

    tokens: int
    keys: list[Tensor] = field(default_factory=list)
    """`[K, P, E]` of each layer."""
    values: list[Tensor] = field(default_factory=list)
    hidden_PD: Tensor | None = None
    """That leave the last of these layers."""

    @property
    def nbytes(self) -> int:
        hidden = 0 if self.hidden_PD is None else self.hidden_PD.nbytes
        return hidden + sum(x.nbytes for x in (*self.keys, *self.values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """Which prompts of a batch go through the first layers whole, and which only with what comes
    behind a prefix.

    Every prompt stands in one of `owners` and `followers`.
    """

    depth: int
    """Layers that are shared."""
    owners: tuple[int, ...]
    """Prompts that go whole, rising."""
    followers: dict[int, PrefixStates]
    """Prompts that go without their prefix; its states are there, or filled by an owner's."""
    kept: dict[int, PrefixStates]
    """Owners whose first tokens' states are to be filled in, of so many tokens as these say."""


Inject = Callable[[int, Tensor, Tensor], None]
"""Adds to the hidden states that leave a layer, of these packed tokens, what the encoder has for
them: `(layer, hidden, packed indices)`, the indices on the CPU."""


def run(
    decoder: Decoder,
    sharing: Sharing,
    embeds_TD: Tensor,
    positions_T: Tensor,
    lengths: Sequence[int],
    cache: LayerCache | None,
    inject: Inject,
) -> Tensor:
    """The first `sharing.depth` layers; call inside `decoder.ragged()`.

    Args:
        embeds_TD: what enters the decoder, of all prompts.
        positions_T: of all tokens, `[T]` or by axis.
        lengths: tokens of each prompt.
        cache: gets keys and values of all tokens, `[1, K, T, E]` for each layer.

    Returns:
        Hidden states `[T, D]` that leave the last of these layers.
    """
    owners = _Owners(decoder, sharing, embeds_TD, positions_T, lengths)
    if not sharing.followers:  # all prompts are owners, and stand as they did
        for layer in range(sharing.depth):
            key, value = owners.run(layer, inject)
            if cache is not None:
                cache.update(key[None], value[None], layer)
        owners.keep()
        return owners.hidden_TD
    followers = _Followers(decoder, sharing, embeds_TD, positions_T, lengths)
    order_T = sent(_order(sharing, lengths, followers.prefixes), embeds_TD.device)
    for layer in range(sharing.depth):
        own = owners.run(layer, inject)
        behind = followers.run(layer)
        if cache is not None:
            stored = followers.stored(layer)
            key, value = (
                torch.cat(parts, dim=1)[:, order_T][None]
                for parts in zip(own, behind, *stored, strict=True)
            )
            cache.update(key, value, layer)
    owners.keep()
    hidden = [own.hidden_PD for own in followers.prefixes if own.hidden_PD is not None]
    assert len(hidden) == len(followers.prefixes), "a prefix that no owner has filled"
    return torch.cat([owners.hidden_TD, followers.hidden_FD, *hidden])[order_T]


class _Capture:
    """A layer's own keys and values, handed on unchanged."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.pair = key[0], value[0]
        return key, value


class _Owners:
    """The prompts that go whole."""

    def __init__(
        self,
        decoder: Decoder,
        sharing: Sharing,
        embeds_TD: Tensor,
        positions_T: Tensor,
        lengths: Sequence[int],
    ) -> None:
        self._decoder, self._sharing = decoder, sharing
        starts = [0, *accumulate(lengths)]
        rows = [torch.arange(starts[row], starts[row + 1]) for row in sharing.owners]
        self._host_index_T = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        index_T = sent(self._host_index_T, embeds_TD.device)
        own = [lengths[row] for row in sharing.owners]
        self._starts = dict(zip(sharing.owners, (0, *accumulate(own)), strict=False))
        self._layout = Packed(tuple(own))
        self.hidden_TD = embeds_TD[index_T]
        self._rotary = decoder.rotary(positions_T[..., index_T])

    def run(self, layer: int, inject: Inject) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[K, T, E]`."""
        if not self._sharing.owners:
            return _none(self._decoder, self.hidden_TD)
        capture = _Capture()
        self.hidden_TD = self._decoder.run_layers(
            layer, layer + 1, self.hidden_TD, self._rotary, self._layout, capture
        )
        inject(layer, self.hidden_TD, self._host_index_T)
        assert capture.pair is not None
        for row, states in self._sharing.kept.items():
            first, last = self._starts[row], self._starts[row] + states.tokens
            key, value = (x[:, first:last].clone() for x in capture.pair)
            states.keys.append(key)
            states.values.append(value)
        return capture.pair

    def keep(self) -> None:
        """Fill in the hidden states that leave the last layer."""
        for row, states in self._sharing.kept.items():
            first = self._starts[row]
            states.hidden_PD = self.hidden_TD[first : first + states.tokens].clone()


class _Followers:
    """What comes behind the prefixes."""

    def __init__(
        self,
        decoder: Decoder,
        sharing: Sharing,
        embeds_TD: Tensor,
        positions_T: Tensor,
        lengths: Sequence[int],
    ) -> None:
        self._decoder = decoder
        device = embeds_TD.device
        self.prefixes = list(dict.fromkeys(sharing.followers.values()))
        starts = [0, *accumulate(lengths)]
        index = [
            torch.arange(starts[row] + prefix.tokens, starts[row + 1])
            for row, prefix in sharing.followers.items()
        ]
        index_F = sent(torch.cat(index), device)
        self.hidden_FD = embeds_TD[index_F]
        self._rotary: Rotary = decoder.rotary(positions_T[..., index_F])
        self._behind = [
            _Behind(prefix, lengths[row] - prefix.tokens, device)
            for row, prefix in sharing.followers.items()
        ]

    def run(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[K, F, E]`."""
        capture, layout = _Capture(), _BehindPrefixes(self._behind, layer)
        self.hidden_FD = self._decoder.run_layers(
            layer, layer + 1, self.hidden_FD, self._rotary, layout, capture
        )
        assert capture.pair is not None
        return capture.pair

    def stored(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each prefix."""
        return [(prefix.keys[layer], prefix.values[layer]) for prefix in self.prefixes]


class _Behind:
    """The tokens of one prompt behind its prefix: each sees that, and those up to itself."""

    def __init__(self, prefix: PrefixStates, tokens: int, device: torch.device) -> None:
        self.prefix, self.tokens = prefix, tokens
        seen = torch.ones(tokens, prefix.tokens + tokens, dtype=torch.bool, device=device)
        self._mask_WL = seen.tril(prefix.tokens)

    def attend(
        self, query_HWE: Tensor, key_KWE: Tensor, value_KWE: Tensor, layer: int, scale: float
    ) -> Tensor:
        """`[W, H, E]`. The queries of a key head's group stand as rows of it: with a mask, older
        kernels know no grouped heads."""
        heads, _, dim = query_HWE.shape
        kv_heads = len(key_KWE)
        key, value = (
            torch.cat([stored[layer], own], dim=1)[None]
            for stored, own in ((self.prefix.keys, key_KWE), (self.prefix.values, value_KWE))
        )
        out = F.scaled_dot_product_attention(
            query_HWE.reshape(1, kv_heads, -1, dim),
            key,
            value,
            attn_mask=self._mask_WL.repeat(heads // kv_heads, 1),
            scale=scale,
        )
        return out.reshape(heads, self.tokens, dim).transpose(0, 1)


class _BehindPrefixes:
    """The layout of all of them, back to back, in one layer. Each is computed by itself, so that
    numbers of one that are not finite stay there."""

    def __init__(self, behind: Sequence[_Behind], layer: int) -> None:
        self._behind, self._layer = behind, layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, F, E]`, `key` and `value [1, K, F, E]` to `[1, F, H, E]`."""
        counts = [one.tokens for one in self._behind]
        parts = zip(
            self._behind, *(x[0].split(counts, 1) for x in (query, key, value)), strict=True
        )
        return torch.cat([one.attend(q, k, v, self._layer, scale) for one, q, k, v in parts])[None]


def _none(decoder: Decoder, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of no tokens."""
    empty = like.new_empty(decoder.num_kv_heads, 0, decoder.head_dim)
    return empty, empty


def _order(sharing: Sharing, lengths: Sequence[int], prefixes: Sequence[PrefixStates]) -> Tensor:
    """Where each of the batch's tokens stands among those of owners, then those that come behind
    prefixes, then those of the prefixes, `[T]`."""
    places: dict[int, Tensor] = {}
    first = 0
    for row in sharing.owners:
        places[row] = torch.arange(first, first + lengths[row])
        first += lengths[row]
    behind: dict[int, Tensor] = {}
    for row in sharing.followers:
        count = lengths[row] - sharing.followers[row].tokens
        behind[row] = torch.arange(first, first + count)
        first += count
    at: dict[PrefixStates, Tensor] = {}
    for prefix in prefixes:
        at[prefix] = torch.arange(first, first + prefix.tokens)
        first += prefix.tokens
    for row, prefix in sharing.followers.items():
        places[row] = torch.cat([at[prefix], behind[row]])
    return torch.cat([places[row] for row in range(len(lengths))])
