"""Prompts that begin alike, as several questions on one image do: their common tokens pass the
first layers once.

Attention is causal, so what the layers make of the first tokens of a prompt does not depend on the
text behind them. That holds up to the first pruning stage, which looks at the whole prompt.

Shapes: T packed tokens, F of them those of followers behind their prefixes, P tokens of a prefix, K
key/value heads, E head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from trio.decoder.attention import Branches, Packed
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
    hidden = [states.hidden_PD for states in followers.prefixes]
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
    """What comes behind the prefixes, as branches of these."""

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
        by_prefix = _by_prefix(sharing.followers)
        self.prefixes = list(by_prefix)
        starts = [0, *accumulate(lengths)]
        rows = list(chain.from_iterable(by_prefix.values()))
        index = [
            torch.arange(starts[row] + sharing.followers[row].tokens, starts[row + 1])
            for row in rows
        ]
        self._index_F = sent(torch.cat([torch.empty(0, dtype=torch.int64), *index]), device)
        self.hidden_FD = embeds_TD[self._index_F]
        self._layout: Branches | None = None
        if rows:
            self._rotary: Rotary = decoder.rotary(positions_T[..., self._index_F])
            behind = [
                [lengths[row] - prefix.tokens for row in own] for prefix, own in by_prefix.items()
            ]
            self._longest = max(prefix.tokens for prefix in by_prefix)
            stored_B = sent(torch.tensor([prefix.tokens for prefix in by_prefix]), device)
            self._layout = Branches.of(behind, device).behind(stored_B, self._longest)

    def run(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[K, F, E]`."""
        if self._layout is None:
            return _none(self._decoder, self.hidden_FD)
        reader = _Reader(self.stored(layer), self._layout, self._longest)
        self.hidden_FD = self._decoder.run_layers(
            layer, layer + 1, self.hidden_FD, self._rotary, self._layout, reader
        )
        assert reader.new is not None
        return reader.new

    def stored(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each prefix."""
        return [(prefix.keys[layer], prefix.values[layer]) for prefix in self.prefixes]


class _Reader:
    """The cache as branches of prefixes see it."""

    def __init__(self, stored: list[tuple[Tensor, Tensor]], layout: Branches, longest: int) -> None:
        self._stored, self._layout, self._longest = stored, layout, longest
        self.new: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stored and new ones, `[B, K, L + W, E]`, for new `[1, K, F, E]`."""
        self.new = key[0], value[0]
        old = zip(*self._stored, strict=True)
        key, value = (
            torch.cat([self._padded(own), self._layout.rectangle(new)], dim=2)
            for own, new in zip(old, (key, value), strict=True)
        )
        return key, value

    def _padded(self, prefixes: Iterable[Tensor]) -> Tensor:
        given = list(prefixes)
        kv_heads, _, dim = given[0].shape
        out = given[0].new_zeros(len(given), kv_heads, self._longest, dim)
        for row, own in enumerate(given):
            out[row, :, : own.shape[1]] = own
        return out


def _none(decoder: Decoder, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of no tokens."""
    empty = like.new_empty(decoder.num_kv_heads, 0, decoder.head_dim)
    return empty, empty


def _by_prefix(followers: dict[int, PrefixStates]) -> dict[PrefixStates, list[int]]:
    """The followers of each prefix."""
    found: dict[PrefixStates, list[int]] = {}
    for row, prefix in followers.items():
        found.setdefault(prefix, []).append(row)
    return found


def _order(sharing: Sharing, lengths: Sequence[int], prefixes: Sequence[PrefixStates]) -> Tensor:
    """Where each of the batch's tokens stands among those of owners, then those that come behind
    prefixes, then those of the prefixes, `[T]`."""
    places: dict[int, Tensor] = {}
    first = 0
    for row in sharing.owners:
        places[row] = torch.arange(first, first + lengths[row])
        first += lengths[row]
    behind: dict[int, Tensor] = {}
    for row in chain.from_iterable(_by_prefix(sharing.followers).values()):
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
