"""The stand-in for the decoder's result at one layer, and the gradient through it, the short way.

TRIO (arXiv 2602.04657), method section. The loss is read at a few rows. Only these need queries,
output projection, MLP, norm and head; every other token reaches them through its key and value in
this one layer. So autograd sees the rows alone, and what they do to all other tokens is written
out here: attention scores forwards, and backwards through keys (and their norm, where there is
one), values and the input norm.

Nothing of the size tokens x hidden is ever held: tokens are gone through in *tiles*, and keys are
worked out where they are needed. Values are projected after attention has summed up their inputs.

Shapes: T packed tokens, R proxy rows of all sequences, B sequences; in a group of neighbours N of
them with S tokens and P rows each, padded; C tokens of a tile; D hidden size, K key/value heads,
G query heads of each, H = K * G, Q = P * G, E head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trio.models.products import few_row_linears, linear, times

if TYPE_CHECKING:
    from trio.models.decoder import Decoder

Span = tuple[int, int]

# Elements [C, D] of a tile on a CPU: as much as its cache holds.
_TILE = 1 << 19
# On a GPU, which products of few rows leave idle, a share of the batch: as much as keeps all that
# is held at a time below a twentieth of one layer's activations.
_TILES_OF_A_BATCH = 28
_LEAST_TOKENS = 64


class Proxy:
    """One decoder layer, final norm and head in float32, whatever the model's dtype.

    float64 models stay in float64. Gradients flow to hidden states, never to weights.

    layer: index of the decoder layer.
    batch_tokens: tokens of the whole batch before any pruning; memory stays small beside theirs.
    head: `output`, or `input_embedding` for the matrix of token embeddings.
    """

    def __init__(self, decoder: Decoder, layer: int, batch_tokens: int, head: str) -> None:
        self._decoder = decoder
        self._layer: Any = decoder.model.layers[layer]
        self._head_is_embedding = head == "input_embedding"
        source = decoder.model.embed_tokens if self._head_is_embedding else decoder.lm_head
        self._head_weight: Any = source.weight
        self.dtype = torch.promote_types(decoder.dtype, torch.float32)
        if decoder.device.type == "cpu":
            self._tile_tokens = max(1, _TILE // decoder.hidden_size)
        else:
            self._tile_tokens = max(_LEAST_TOKENS, batch_tokens // _TILES_OF_A_BATCH)

    def gradient_norms(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        wanted: Sequence[Span],
        gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Norms of the gradient of a function of the rows' logits by each hidden state.

        Args:
            hidden_TD: hidden states that enter the layer, packed, any floating dtype.
            positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
            rows: for each sequence the indices of its rows, rising.
            lengths: tokens of each sequence.
            wanted: for each sequence the tokens `(start, stop)` whose norms are wanted.
            gradient: from logits `[R, V]`, which it may overwrite, to the function's gradient by
                them, as `[R, V]` and a factor `[R]`.

        Returns:
            `[T]` in `self.dtype`; NaN at tokens that are not wanted.
        """
        # Inference tensors cannot take part in autograd, a copy made outside of that mode can.
        with torch.inference_mode(False), torch.enable_grad(), few_row_linears():
            device = hidden_TD.device
            starts = [0, *accumulate(lengths)]
            index_R = torch.tensor(
                [start + row for start, own in zip(starts, rows, strict=False) for row in own],
                device=device,
            )
            rows_RD = hidden_TD[index_R].to(self.dtype).requires_grad_()
            cos, sin = self._decoder.rotary(positions_T, self.dtype)
            others = _Others(self._layer, hidden_TD, cos[0], sin[0], self.dtype, self._tile_tokens)
            groups = _group(rows, lengths, wanted, self._tile_tokens)
            with self._decoder.ragged():
                out = self._layer(
                    rows_RD[None],
                    attention_mask=None,
                    position_embeddings=(cos[:, index_R], sin[:, index_R]),
                    past_key_values=None,
                    use_cache=False,
                    layout=_RowAttention(others, groups),
                )
            normed_RD = self._decoder.model.norm(out[0])
            with torch.no_grad():
                gradient_RV, factor_R = gradient(self._project(normed_RD))
                by_normed_RD = times(gradient_RV, self._head_weight).mul_(factor_R[:, None])
            (grad_RD,) = torch.autograd.grad(normed_RD, rows_RD, by_normed_RD)
            return others.norms(index_R, grad_RD)

    def _project(self, normed_RD: Tensor) -> Tensor:
        """Logits `[R, V]`."""
        if self._head_is_embedding:
            return linear(normed_RD, self._head_weight)
        return self._decoder.project(normed_RD)


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring sequences that are worked on together.

    start: packed index of the first token. lengths: tokens of each. rows: of each.
    first_row: packed index of the first row.
    wanted: the tokens whose norms are wanted, in each sequence.
    """

    start: int
    lengths: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    first_row: int
    wanted: Span

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

    def present(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of tokens `start … stop-1` of each, those that are there: places in the flattened
        `[N * C]`, and packed indices."""
        length_N1 = torch.tensor(self.lengths)[:, None]
        first_N1 = self.start + length_N1.cumsum(0) - length_N1
        token_C = torch.arange(start, stop)
        there = token_C < length_N1
        return there.flatten().nonzero()[:, 0], (first_N1 + token_C)[there]

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
        return x_R[torch.tensor(index, device=x_R.device)]

    def true_rows(self, x_NP: Tensor) -> Tensor:
        """`[N, P, ...]` to `[R, ...]` of this group's rows, without repetitions."""
        counts = [len(own) for own in self.rows]
        if min(counts) == self.most_rows:
            return x_NP.flatten(0, 1)
        there_NP = torch.arange(self.most_rows) < torch.tensor(counts)[:, None]
        return x_NP.flatten(0, 1)[there_NP.flatten().nonzero()[:, 0].to(x_NP.device)]

    def hidden_from_rows(self) -> Tensor:
        """True where a key lies after a row, `[N, 1, P, 1, S]`."""
        rows = [[own[min(i, len(own) - 1)] for i in range(self.most_rows)] for own in self.rows]
        return torch.arange(self.longest) > torch.tensor(rows)[:, None, :, None, None]


def _group(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    wanted: Sequence[Span],
    tile_tokens: int,
) -> list[_Group]:
    groups: list[_Group] = []
    starts, first_rows = [0, *accumulate(lengths)], [0, *accumulate(map(len, rows))]
    first = 0
    for last in range(1, len(lengths) + 1):
        longest = max(lengths[first : last + 1], default=0)
        if last < len(lengths) and longest * (last + 1 - first) <= tile_tokens:
            continue
        spans = wanted[first:last]
        hull = min(start for start, _ in spans), max(stop for _, stop in spans)
        groups.append(
            _Group(
                starts[first],
                tuple(lengths[first:last]),
                tuple(map(tuple, rows[first:last])),
                first_rows[first],
                hull,
            )
        )
        first = last
    return groups


class _RowAttention:
    """As the attention of a layer: the rows' queries against all tokens, causal by row index."""

    def __init__(self, others: _Others, groups: Sequence[_Group]) -> None:
        self._others = others
        self._groups = groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, R, E]` to `[1, R, H, E]`; the rows' own keys and values are not needed."""
        others = self._others
        query_RKGE = (query[0].transpose(0, 1) * scale).unflatten(1, (others.kv_heads, -1))
        pieces = []
        for group in self._groups:
            query_NPKGE = group.padded_rows(query_RKGE)
            shape = query_NPKGE.shape
            query_NKQE = query_NPKGE.transpose(1, 2).flatten(2, 3)
            summed = _Summed.apply(others, group, query_NKQE, _turned(query_NKQE))
            assert isinstance(summed, Tensor)
            summed_NPKGD = summed.unflatten(2, (shape[1], shape[3])).transpose(1, 2)
            pieces.append(group.true_rows(summed_NPKGD))
        out_RKGE = others.project_values(torch.cat(pieces))
        return out_RKGE.flatten(1, 2)[None]


def _turned(x: Tensor) -> Tensor:
    """What the sine's part of a rotated key is to be multiplied with."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


class _Summed(torch.autograd.Function):
    """Attention-weighted sums `[N, K, Q, D]` of normed hidden states, by queries `[N, K, Q, E]` for
    the cosine's part of the keys and such for the sine's."""

    @staticmethod
    def forward(ctx: Any, others: _Others, group: _Group, cosine: Tensor, sine: Tensor) -> Tensor:
        share, summed = others.attend(group, cosine, sine)
        ctx.others, ctx.group = others, group
        ctx.save_for_backward(cosine, sine, share, summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.others.backward(ctx.group, *ctx.saved_tensors, gradients[0])


class _Others:
    """All tokens of the batch as the rows' attention sees them, and their gradients."""

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
        self._hidden_TD = hidden_TD.detach()
        self._cos_TE, self._sin_TE = cos_TE, sin_TE
        self._dtype = dtype
        self._norm_D = norm.weight.detach()
        self._epsilon: float = norm.variance_epsilon
        self._key_weight = attention.k_proj.weight.detach()
        bias = attention.k_proj.bias
        self._key_bias = None if bias is None else bias.detach()
        self._key_norm: Any = getattr(attention, "k_norm", None)
        self._value = attention.v_proj
        self._head_dim: int = cos_TE.shape[-1]
        self.kv_heads: int = len(self._key_weight) // self._head_dim
        self._norms_T = hidden_TD.new_full(hidden_TD.shape[:1], float("nan"), dtype=dtype)
        self._at_rows: list[tuple[Tensor, Tensor]] = []
        """Of rows that are wanted tokens too: which ones, and their gradients as tokens."""
        self._tile_tokens = tile_tokens

    def project_values(self, summed_RKGD: Tensor) -> Tensor:
        """Values `[R, K, G, E]` of sums of normed hidden states."""
        rows, _, group, _ = summed_RKGD.shape
        weight_KED = self._value.weight.detach().unflatten(0, (self.kv_heads, self._head_dim))
        out_KNE = linear(summed_RKGD.transpose(0, 1).flatten(1, 2), weight_KED)
        out_RKGE = out_KNE.unflatten(1, (rows, group)).transpose(0, 1)
        if self._value.bias is None:
            return out_RKGE
        return out_RKGE + self._value.bias.detach().view(self.kv_heads, 1, self._head_dim)

    def attend(self, group: _Group, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of each row `[N, K, Q, S]`, summing to 1 over S, and by it the sums
        `[N, K, Q, D]` of normed hidden states."""
        pieces = []
        for tile in self._tiles(group):
            keys, cos, sin = self._keys(tile)
            scores = torch.matmul(cosine, (keys * cos).transpose(2, 3))
            pieces.append(scores.add_(torch.matmul(sine, keys.mul_(sin).transpose(2, 3))))
        scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)
        rows = scores.unflatten(2, (group.most_rows, -1))
        rows.masked_fill_(group.hidden_from_rows().to(scores.device), float("-inf"))
        share = scores.softmax(dim=-1)
        flat = share.flatten(1, 2)
        summed = share.new_zeros(*flat.shape[:2], self._hidden_TD.shape[1])
        for last in [tile] if len(pieces) == 1 else self._tiles(group):
            summed.baddbmm_(flat[..., last.start : last.stop], last.unit)
        return share, summed.mul_(self._norm_D).view(*share.shape[:3], -1)

    def backward(
        self,
        group: _Group,
        cosine: Tensor,
        sine: Tensor,
        share: Tensor,
        summed: Tensor,
        gradient: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Notes the norms of the wanted tokens' gradients; returns those of the queries, if any."""
        mean = (gradient * summed).sum(dim=-1, keepdim=True)
        gradient = (gradient * self._norm_D).flatten(1, 2)

        def by_score(tile: _Tile) -> Tensor:
            by_share = torch.bmm(gradient, tile.unit.transpose(1, 2)).view(*share.shape[:3], -1)
            return by_share.sub_(mean).mul_(share[..., tile.start : tile.stop])

        for tile in self._tiles(group, *group.wanted):
            score_NKCQ = by_score(tile).transpose(2, 3)
            cos, sin = self._angles(tile)
            by_key = torch.matmul(score_NKCQ, cosine).mul_(cos)
            by_key.addcmul_(torch.matmul(score_NKCQ, sine), sin)
            by_key_NCKE = by_key.transpose(1, 2)
            if self._key_norm is not None:
                self._through_key_norm(tile, by_key_NCKE)
            by_normed = times(by_key_NCKE.flatten(0, 1).flatten(1), self._key_weight)
            by_unit = by_normed.mul_(self._norm_D).view_as(tile.unit)
            own = share[..., tile.start : tile.stop].flatten(1, 2)
            by_unit.baddbmm_(own.transpose(1, 2), gradient)
            # Backwards through the norm: the part along the token itself goes.
            along = (tile.unit * by_unit).mean(dim=-1, keepdim=True)
            self._note(group, tile, by_unit.addcmul_(tile.unit, along, value=-1))
        if not group.has_wanted_rows:
            return None, None
        by_cosine, by_sine = torch.zeros_like(cosine), torch.zeros_like(sine)
        for tile in self._tiles(group):
            score = by_score(tile)
            keys, cos, sin = self._keys(tile)
            by_cosine += torch.matmul(score, keys * cos)
            by_sine += torch.matmul(score, keys.mul_(sin))
        return by_cosine, by_sine

    def norms(self, index_R: Tensor, grad_RD: Tensor) -> Tensor:
        """All norms `[T]`, once the gradient that the rows get as rows is known."""
        if self._at_rows:
            places = torch.cat([rows for rows, _ in self._at_rows])
            whole = torch.cat([gradient for _, gradient in self._at_rows]) + grad_RD[places]
            self._norms_T[index_R[places]] = torch.linalg.vector_norm(whole, dim=-1)
        return self._norms_T

    def _note(self, group: _Group, tile: _Tile, gradient_NCD: Tensor) -> None:
        """`gradient_NCD`: of the tile's tokens, times their root mean square."""
        device = gradient_NCD.device
        norms_NC = torch.linalg.vector_norm(gradient_NCD, dim=-1) * tile.inverse[..., 0]
        if group.is_even:
            self._gather(self._norms_T, group, tile.start, tile.stop).copy_(norms_NC)
        else:
            place, packed = group.present(tile.start, tile.stop)
            self._norms_T[packed.to(device)] = norms_NC.flatten()[place.to(device)]
        if not group.has_wanted_rows:
            return
        inside = [
            (group.first_row + number, place)
            for number, place in enumerate(group.row_places(tile.start, tile.stop))
            if place is not None
        ]
        if inside:
            rows, places = torch.tensor(inside, device=device).unbind(1)
            gradient_RD = gradient_NCD.flatten(0, 1)[places] * tile.inverse.flatten(0, 1)[places]
            self._at_rows.append((rows, gradient_RD))

    def _tiles(self, group: _Group, start: int = 0, stop: int | None = None) -> Iterator[_Tile]:
        stop = group.longest if stop is None else min(stop, group.longest)
        step = max(1, self._tile_tokens // len(group.lengths))
        for first in range(start, stop, step):
            yield self._tile(group, first, min(first + step, stop))

    def _tile(self, group: _Group, start: int, stop: int) -> _Tile:
        hidden_NCD = self._gather(self._hidden_TD, group, start, stop).to(self._dtype)
        inverse = _inverse_root(hidden_NCD, self._epsilon)
        return _Tile(group, start, stop, hidden_NCD * inverse, inverse)

    def _keys(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[N, K, C, E]` before rotation, and the rotation's cosines and sines."""
        keys_NCKE = self._projected_keys(tile)
        if self._key_norm is not None:
            inverse = _inverse_root(keys_NCKE, self._key_norm.variance_epsilon)
            keys_NCKE.mul_(inverse).mul_(self._key_norm.weight.detach())
        keys = keys_NCKE.transpose(1, 2)
        # One sequence's heads are multiplied as they lie; several would be copied at each use.
        return keys if len(keys) == 1 else keys.contiguous(), *self._angles(tile)

    def _projected_keys(self, tile: _Tile) -> Tensor:
        """`[N, C, K, E]`, as the projection gives them."""
        normed = (tile.unit * self._norm_D).flatten(0, 1)
        keys = times(normed, self._key_weight.T)
        if self._key_bias is not None:
            keys = keys.add_(self._key_bias)
        return keys.view(*tile.unit.shape[:2], self.kv_heads, self._head_dim)

    def _through_key_norm(self, tile: _Tile, by_key_NCKE: Tensor) -> None:
        """In place from the gradient by normed keys to that by projected ones, in which the part
        along the key itself is gone."""
        unit = self._projected_keys(tile)
        inverse = _inverse_root(unit, self._key_norm.variance_epsilon)
        unit.mul_(inverse)
        by_key_NCKE.mul_(self._key_norm.weight.detach())
        along = (unit * by_key_NCKE).mean(dim=-1, keepdim=True)
        by_key_NCKE.addcmul_(unit, along, value=-1).mul_(inverse)

    def _angles(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """`[N, 1, C, E]` each."""
        place = (tile.group, tile.start, tile.stop)
        cos, sin = (self._gather(x, *place) for x in (self._cos_TE, self._sin_TE))
        return cos[:, None], sin[:, None]

    def _gather(self, x_T: Tensor, group: _Group, start: int, stop: int) -> Tensor:
        if not group.is_even:
            return x_T[group.tokens(start, stop).to(x_T.device)]
        count, length = len(group.lengths), group.lengths[0]
        own = x_T[group.start : group.start + count * length]
        return own.unflatten(0, (count, length))[:, start:stop]


def _inverse_root(x: Tensor, epsilon: float) -> Tensor:
    """One over the root mean square along the last dimension, which stays."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tokens `start … stop-1` of each sequence of a group.

    unit: `[N, C, D]`, hidden states divided by their root mean square.
    inverse: `[N, C, 1]`, one over that root.
    """

    group: _Group
    start: int
    stop: int
    unit: Tensor
    inverse: Tensor
