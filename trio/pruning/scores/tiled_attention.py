"""Attention of a few query rows to all tokens of one layer, tile by tile, in float32.

Tokens are gone through in *tiles*, and keys are worked out where they are needed: nothing of the
size tokens x hidden is ever held. What looks at a layer in this way is the gradient saliency
(`trio.pruning.scores.layer_gradient`) and the attention of a prompt's last token
(`trio.pruning.scores.last_token_attention`).

Shapes: T packed tokens, R rows of all sequences; in a group of neighbours N sequences with S tokens
and P rows each, padded; C tokens of a tile; D hidden size, K key/value heads, G query heads of
each, Q = P * G, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trio.decoder.decoder import Decoder
from trio.decoder.gpu import on_gpu, sent
from trio.decoder.matmul import times

Span = tuple[int, int]

# Elements [C, D] of a tile: on a CPU as much as its cache holds. On a GPU, where each operation is
# a launch, 256 MB in float32, of which four are held at a time: 16,384 tokens of a 7B model.
_TILE, _TILE_ON_DEVICE = 3 << 17, 1 << 26


def tile_tokens(decoder: Decoder) -> int:
    """Tokens of a tile."""
    elements = _TILE_ON_DEVICE if on_gpu(decoder.device) else _TILE
    return max(1, elements // decoder.hidden_size)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring sequences that are worked on together."""

    start: int
    """Packed index of the first token."""
    lengths: tuple[int, ...]
    """Tokens of each."""
    rows: tuple[tuple[int, ...], ...]
    """Of each."""
    first_row: int
    """Packed index of the first row."""
    wanted: Span
    """The tokens whose norms are wanted, in each sequence."""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def most_rows(self) -> int:
        return max(map(len, self.rows))

    @property
    def is_even(self) -> bool:
        """Whether all sequences are of one length, so that their tokens lie in a rectangle."""
        return len(set(self.lengths)) == 1

    @property
    def has_wanted_rows(self) -> bool:
        """Whether rows are wanted tokens too: then their queries carry gradient to themselves."""
        start, stop = self.wanted
        return any(start <= row < stop for own in self.rows for row in own)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Packed indices `[N, C]` of tokens `start … stop-1` of each.

        Past the end of a shorter sequence its last token is repeated.
        """
        length_N1 = torch.tensor(self.lengths)[:, None]
        first_N1 = self.start + length_N1.cumsum(0) - length_N1
        return first_N1 + torch.arange(start, stop).minimum(length_N1 - 1)

    def present(self, start: int, stop: int) -> Tensor:
        """Of tokens `start … stop-1` of each, those that are there: places in the flattened
        `[N * C]`, and packed indices, in two rows."""
        length_N1 = torch.tensor(self.lengths)[:, None]
        first_N1 = self.start + length_N1.cumsum(0) - length_N1
        token_C = torch.arange(start, stop)
        there = token_C < length_N1
        return torch.stack([there.flatten().nonzero()[:, 0], (first_N1 + token_C)[there]])

    def row_places(self, start: int, stop: int) -> list[int | None]:
        """For each row its place among the flattened tokens `start … stop-1` of each, if any."""
        return [
            number * (stop - start) + row - start if start <= row < stop else None
            for number, own in enumerate(self.rows)
            for row in own
        ]

    def padded_rows(self, x_R: Tensor) -> Tensor:
        """`[R, ...]` of all sequences' rows to `[N, P, ...]` of this group's; where a sequence
        lacks a row, its last is repeated."""
        first, most = self.first_row, self.most_rows
        if all(len(own) == most for own in self.rows):
            return x_R[first : first + most * len(self.rows)].unflatten(0, (-1, most))
        index = []
        for own in self.rows:
            index.append([first + min(i, len(own) - 1) for i in range(most)])
            first += len(own)
        return x_R[sent(torch.tensor(index), x_R.device)]

    def true_rows(self, x_NP: Tensor) -> Tensor:
        """`[N, P, ...]` to `[R, ...]` of this group's rows, without repetitions."""
        counts = [len(own) for own in self.rows]
        if min(counts) == self.most_rows:
            return x_NP.flatten(0, 1)
        there_NP = torch.arange(self.most_rows) < torch.tensor(counts)[:, None]
        return x_NP.flatten(0, 1)[sent(there_NP.flatten().nonzero()[:, 0], x_NP.device)]

    def hidden_from_rows(self, device: torch.device) -> Tensor:
        """True where a key lies after a row, `[N, 1, P, 1, S]`."""
        rows = [[own[min(i, len(own) - 1)] for i in range(self.most_rows)] for own in self.rows]
        row_NP = sent(torch.tensor(rows), device)
        return torch.arange(self.longest, device=device) > row_NP[:, None, :, None, None]


def group_sequences(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    wanted: Sequence[Span],
    tile_tokens: int,
) -> list[Group]:
    """Neighbours together as long as they fill no more than a tile.

    Args:
        rows: for each sequence the indices of its rows, rising.
        lengths: tokens of each sequence.
        wanted: for each sequence the tokens `(start, stop)` whose norms are wanted.
        tile_tokens: tokens of a tile.
    """
    groups: list[Group] = []
    starts, first_rows = [0, *accumulate(lengths)], [0, *accumulate(map(len, rows))]
    first = 0
    for last in range(1, len(lengths) + 1):
        longest = max(lengths[first : last + 1], default=0)
        if last < len(lengths) and longest * (last + 1 - first) <= tile_tokens:
            continue
        spans = wanted[first:last]
        hull = min(start for start, _ in spans), max(stop for _, stop in spans)
        groups.append(
            Group(
                starts[first],
                tuple(lengths[first:last]),
                tuple(map(tuple, rows[first:last])),
                first_rows[first],
                hull,
            )
        )
        first = last
    return groups


def rotated_half(x: Tensor) -> Tensor:
    """What the sine's part of a rotated key is to be multiplied with."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


class Keys:
    """All tokens of a batch as the rows' queries see them in a layer.

    layer: of transformers. hidden_TD: hidden states that enter it, packed, any floating dtype.
    cos_TE, sin_TE: their rotation, in `dtype`, which all else is computed in, too.
    """

    def __init__(
        self,
        layer: Any,
        hidden_TD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        dtype: torch.dtype,
        tile_tokens: int,
    ) -> None:
        attention, norm = layer.self_attn, layer.input_layernorm
        self.hidden_TD = hidden_TD.detach()
        self._cos_TE, self._sin_TE = cos_TE, sin_TE
        self._dtype = dtype
        self.norm_D = norm.weight.detach()
        self._epsilon: float = norm.variance_epsilon
        self.key_weight = attention.k_proj.weight.detach()
        bias = attention.k_proj.bias
        self._key_bias = None if bias is None else bias.detach()
        self.key_norm: Any = getattr(attention, "k_norm", None)
        self.head_dim: int = cos_TE.shape[-1]
        self.kv_heads: int = len(self.key_weight) // self.head_dim
        self._tile_tokens = tile_tokens
        self._last: tuple[tuple[Group, int, int], Tensor] | None = None

    def by_head(self, query: Tensor, scale: float) -> Tensor:
        """Scaled queries `[R, K, G, E]` of `query [1, H, R, E]`."""
        return (query[0].transpose(0, 1) * scale).unflatten(1, (self.kv_heads, -1))

    def shares(
        self, group: Group, cosine: Tensor, sine: Tensor, tiles: Iterable[Tile] | None = None
    ) -> Tensor:
        """Attention of each row, `[N, K, Q, S]`, summing to 1 over S; causal by row index.

        Args:
            cosine: scaled queries `[N, K, Q, E]` for the cosine's part of the keys.
            sine: the same for the sine's: `rotated_half(cosine)`.
            tiles: all of the group's, if they are at hand.
        """
        pieces = []
        for tile in self.tiles(group) if tiles is None else tiles:
            keys, cos, sin = self.unrotated(tile)
            scores = torch.matmul(cosine, (keys * cos).transpose(2, 3))
            pieces.append(scores.add_(torch.matmul(sine, keys.mul_(sin).transpose(2, 3))))
        scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)
        rows = scores.unflatten(2, (group.most_rows, -1))
        rows.masked_fill_(group.hidden_from_rows(scores.device), float("-inf"))
        return scores.softmax(dim=-1)

    def spread(self, out_T: Tensor, group: Group, start: int, own_NC: Tensor) -> None:
        """Writes what tokens `start, start + 1, ...` of each sequence have into `[T]`."""
        stop = start + own_NC.shape[1]
        if group.is_even:
            self._gather(out_T, group, start, stop).copy_(own_NC)
        else:
            place, packed = sent(group.present(start, stop), out_T.device)
            out_T[packed] = own_NC.flatten()[place]

    def tiles(self, group: Group, start: int = 0, stop: int | None = None) -> Iterator[Tile]:
        stop = group.longest if stop is None else min(stop, group.longest)
        step = self.step(group)
        for first in range(start, stop, step):
            yield self._tile(group, first, min(first + step, stop))

    def step(self, group: Group) -> int:
        """Tokens of each sequence that make a tile."""
        return max(1, self._tile_tokens // len(group.lengths))

    def _tile(self, group: Group, start: int, stop: int) -> Tile:
        hidden_NCD = self._gather(self.hidden_TD, group, start, stop).to(self._dtype)
        inverse = inverse_root(hidden_NCD, self._epsilon)
        return Tile(group, start, stop, hidden_NCD * inverse, inverse)

    def unrotated(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[N, K, C, E]` before rotation, and the rotation's cosines and sines."""
        keys_NCKE = self.projected(tile)
        if self.key_norm is not None:
            inverse = inverse_root(keys_NCKE, self.key_norm.variance_epsilon)
            keys_NCKE.mul_(inverse).mul_(self.key_norm.weight.detach())
        keys = keys_NCKE.transpose(1, 2)
        # One sequence's heads are multiplied as they lie; several would be copied at each use.
        return keys if len(keys) == 1 else keys.contiguous(), *self.angles(tile)

    def projected(self, tile: Tile) -> Tensor:
        """`[N, C, K, E]`, as the projection gives them."""
        normed = (tile.unit * self.norm_D).flatten(0, 1)
        keys = times(normed, self.key_weight.T)
        if self._key_bias is not None:
            keys = keys.add_(self._key_bias)
        return keys.view(*tile.unit.shape[:2], self.kv_heads, self.head_dim)

    def angles(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """`[N, 1, C, E]` each."""
        place = (tile.group, tile.start, tile.stop)
        cos, sin = (self._gather(x, *place) for x in (self._cos_TE, self._sin_TE))
        return cos[:, None], sin[:, None]

    def _gather(self, x_T: Tensor, group: Group, start: int, stop: int) -> Tensor:
        if not group.is_even:
            return x_T[self._tokens(group, start, stop)]
        count, length = len(group.lengths), group.lengths[0]
        own = x_T[group.start : group.start + count * length]
        return own.unflatten(0, (count, length))[:, start:stop]

    def _tokens(self, group: Group, start: int, stop: int) -> Tensor:
        """`Group.tokens` on the device, of the tile asked for last."""
        if self._last is None or self._last[0] != (group, start, stop):
            tokens_NC = sent(group.tokens(start, stop), self.hidden_TD.device)
            self._last = (group, start, stop), tokens_NC
        return self._last[1]


def inverse_root(x: Tensor, epsilon: float) -> Tensor:
    """One over the root mean square along the last dimension, which stays."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens `start … stop-1` of each sequence of a group."""

    group: Group
    start: int
    stop: int
    unit: Tensor
    """`[N, C, D]`, hidden states divided by their root mean square."""
    inverse: Tensor
    """`[N, C, 1]`, one over that root."""
