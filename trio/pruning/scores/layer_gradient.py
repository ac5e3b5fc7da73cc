"""Forward and backward of the loss proxy through one decoder layer, exact and cheap.

TRIO (arXiv 2602.04657), method section. The loss is read at a few rows. Only these need queries,
output projection, MLP, norm and head; every other token reaches them through its key and value in
this one layer. So autograd runs over the rows alone, and is cut at their attention. The gradient by
all other tokens is derived by hand below: attention scores forwards, and backwards through keys
(and their norm, where there is one), values and the input norm.

Tokens are gone through in tiles, see `tiled_attention`. Values are projected after attention has
summed up their inputs.

Shapes: T packed tokens, R proxy rows of all sequences, B sequences; in a group of neighbours N of
them with S tokens and P rows each, padded; C tokens of a tile; D hidden size, K key/value heads,
G query heads of each, H = K * G, Q = P * G, E head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trio.decoder.decoder import Decoder
from trio.decoder.gpu import sent
from trio.decoder.matmul import linear, through_linear, times
from trio.pruning.scores.tiled_attention import (
    Group,
    Keys,
    Span,
    Tile,
    group_sequences,
    inverse_root,
    rotated_half,
    tile_tokens,
)


class LayerGradient:
    """One decoder layer, final norm and head in float32, whatever the model's dtype.

    float64 models stay in float64. Gradients flow to hidden states, never to weights.

    layer: index of the decoder layer.
    head: `output`, or `input_embedding` for the matrix of token embeddings.
    """

    def __init__(self, decoder: Decoder, layer: int, head: str = "output") -> None:
        self._decoder = decoder
        self._layer: Any = decoder.model.layers[layer]
        self._head_is_embedding = head == "input_embedding"
        source = decoder.model.embed_tokens if self._head_is_embedding else decoder.lm_head
        self._head_weight: Any = source.weight
        self.dtype = torch.promote_types(decoder.dtype, torch.float32)
        self._tile_tokens = tile_tokens(decoder)

    def forward(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        wanted: Sequence[Span],
    ) -> Forward:
        """The rows' logits, and what it takes to go back from them.

        Args:
            hidden_TD: hidden states that enter the layer, packed, any floating dtype.
            positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
            rows: for each sequence the indices of its rows, rising.
            lengths: tokens of each sequence.
            wanted: for each sequence the tokens `(start, stop)` whose norms are wanted.
        """
        starts = [0, *accumulate(lengths)]
        index_R = torch.tensor(
            [start + row for start, own in zip(starts, rows, strict=False) for row in own]
        )
        index_R = sent(index_R, hidden_TD.device)
        with _autograd():
            rows_RD = hidden_TD[index_R].to(self.dtype).requires_grad_()
            cos, sin = self._decoder.rotary(positions_T, self.dtype)
            keys = Keys(self._layer, hidden_TD, cos[0], sin[0], self.dtype, self._tile_tokens)
            groups = group_sequences(rows, lengths, wanted, self._tile_tokens)
            attention = _RowAttention(keys, self._layer.self_attn.v_proj, groups)
            with self._decoder.ragged(), through_linear():
                out = self._layer(
                    rows_RD[None],
                    attention_mask=None,
                    position_embeddings=(cos[:, index_R], sin[:, index_R]),
                    layout=attention,
                )
            normed_RD = self._decoder.model.norm(out[0])
            with torch.no_grad():
                logits_RV = self._project(normed_RD)
        return Forward(
            keys=keys,
            head_weight_VD=self._head_weight,
            index_R=index_R,
            rows_RD=rows_RD,
            attended=attention.attended,
            normed_RD=normed_RD,
            logits_RV=logits_RV,
        )

    def _project(self, normed_RD: Tensor) -> Tensor:
        """Logits `[R, V]`."""
        if self._head_is_embedding:
            return linear(normed_RD, self._head_weight)
        return self._decoder.project(normed_RD)


@contextmanager
def _autograd() -> Iterator[None]:
    """Gradients of the rows, whatever mode the caller is in."""
    # Inference tensors cannot take part in autograd, a copy made outside of that mode can.
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attended:
    """One group's attention, where autograd is cut."""

    group: Group
    cosine_NKQE: Tensor
    """Scaled queries, for the cosine's part of the keys; made of the rows by autograd."""
    sine_NKQE: Tensor
    """The same for the sine's part."""
    share_NKQS: Tensor
    """Attention of each row to all tokens."""
    summed_NKQD: Tensor
    """By it, sums of normed hidden states; autograd starts anew here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """A pass of the rows through a layer, norm and head."""

    keys: Keys
    head_weight_VD: Tensor
    index_R: Tensor
    """Packed index of each row."""
    rows_RD: Tensor
    """The rows as they enter the layer."""
    attended: Sequence[_Attended]
    normed_RD: Tensor
    """The rows as they enter the head."""
    logits_RV: Tensor
    """May be overwritten."""

    def gradient_norms(self, gradient_RV: Tensor, factor_R: Tensor) -> Tensor:
        """Norms of the gradient of a function of the logits by each hidden state.

        Args:
            gradient_RV: its gradient by the logits, but for a factor of each row.
            factor_R: that factor.

        Returns:
            `[T]` in float32 or better; NaN at tokens that are not wanted.
        """
        with _autograd():
            with torch.no_grad():
                by_normed_RD = times(gradient_RV, self.head_weight_VD).mul_(factor_R[:, None])
            summed = [own.summed_NKQD for own in self.attended]
            by_rows_RD, *by_summed = torch.autograd.grad(
                self.normed_RD, [self.rows_RD, *summed], by_normed_RD
            )
            backward = [
                _Backward(self.keys, own, gradient)
                for own, gradient in zip(self.attended, by_summed, strict=True)
            ]
            through = [own for own in backward if own.group.has_wanted_rows]
            if through:
                queries = [q for own in through for q in own.queries]
                by_queries = [q for own in through for q in own.by_queries()]
                (by_query_RD,) = torch.autograd.grad(queries, self.rows_RD, by_queries)
                by_rows_RD = by_rows_RD + by_query_RD
        with torch.no_grad():
            return self._norms(backward, by_rows_RD)

    def _norms(self, backward: Sequence[_Backward], by_rows_RD: Tensor) -> Tensor:
        """Of the tokens' gradients, to which rows that are wanted tokens add what they get as
        rows."""
        norms_T = by_rows_RD.new_full(self.keys.hidden_TD.shape[:1], float("nan"))
        for own in backward:
            for tile in self.keys.tiles(own.group, *own.group.wanted):
                by_token_NCD = own.by_tokens(tile)
                norms_NC = torch.linalg.vector_norm(by_token_NCD, dim=-1) * tile.inverse[..., 0]
                self.keys.spread(norms_T, own.group, tile.start, norms_NC)
                if own.group.has_wanted_rows:
                    self._add_rows(norms_T, own.group, tile, by_token_NCD, by_rows_RD)
        return norms_T

    def _add_rows(
        self,
        norms_T: Tensor,
        group: Group,
        tile: Tile,
        by_token_NCD: Tensor,
        by_rows_RD: Tensor,
    ) -> None:
        inside = [
            (group.first_row + number, place)
            for number, place in enumerate(group.row_places(tile.start, tile.stop))
            if place is not None
        ]
        if not inside:
            return
        rows, places = sent(torch.tensor(inside), norms_T.device).unbind(1)
        as_tokens_RD = by_token_NCD.flatten(0, 1)[places] * tile.inverse.flatten(0, 1)[places]
        whole_RD = as_tokens_RD + by_rows_RD[rows]
        norms_T[self.index_R[rows]] = torch.linalg.vector_norm(whole_RD, dim=-1)


class _RowAttention:
    """As the attention of a layer: the rows' queries against all tokens, causal by row index."""

    attended: Sequence[_Attended]

    def __init__(self, keys: Keys, value_projection: Any, groups: Sequence[Group]) -> None:
        self._keys = keys
        self._value = value_projection
        self._groups = groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, R, E]` to `[1, R, H, E]`; the rows' own keys and values are not needed."""
        query_RKGE = self._keys.by_head(query, scale)
        self.attended = [self._attended(group, query_RKGE) for group in self._groups]
        pieces = []
        for own in self.attended:
            rows, heads = own.group.most_rows, query_RKGE.shape[2]
            summed_NPKGD = own.summed_NKQD.unflatten(2, (rows, heads)).transpose(1, 2)
            pieces.append(own.group.true_rows(summed_NPKGD))
        return self._project_values(torch.cat(pieces)).flatten(1, 2)[None]

    def _attended(self, group: Group, query_RKGE: Tensor) -> _Attended:
        cosine_NKQE = group.padded_rows(query_RKGE).transpose(1, 2).flatten(2, 3)
        sine_NKQE = rotated_half(cosine_NKQE)
        with torch.no_grad():
            share_NKQS, summed_NKQD = _attend(self._keys, group, cosine_NKQE, sine_NKQE)
        return _Attended(
            group=group,
            cosine_NKQE=cosine_NKQE,
            sine_NKQE=sine_NKQE,
            share_NKQS=share_NKQS,
            summed_NKQD=summed_NKQD.requires_grad_(),
        )

    def _project_values(self, summed_RKGD: Tensor) -> Tensor:
        """Values `[R, K, G, E]` of sums of normed hidden states."""
        rows, heads, group, _ = summed_RKGD.shape
        weight_KED = self._value.weight.detach().unflatten(0, (heads, -1))
        out_KNE = linear(summed_RKGD.transpose(0, 1).flatten(1, 2), weight_KED)
        out_RKGE = out_KNE.unflatten(1, (rows, group)).transpose(0, 1)
        if self._value.bias is None:
            return out_RKGE
        return out_RKGE + self._value.bias.detach().view(heads, 1, -1)


def _attend(keys: Keys, group: Group, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each row `[N, K, Q, S]`, summing to 1 over S, and by it the sums `[N, K, Q, D]`
    of normed hidden states."""
    tiles = list(keys.tiles(group)) if group.longest <= keys.step(group) else None
    share = keys.shares(group, cosine, sine, tiles)
    flat = share.flatten(1, 2)
    if tiles:
        summed = torch.bmm(flat, tiles[0].unit)
    else:
        summed = share.new_zeros(*flat.shape[:2], keys.hidden_TD.shape[1])
        for tile in keys.tiles(group):
            summed.baddbmm_(flat[..., tile.start : tile.stop], tile.unit)
    return share, summed.mul_(keys.norm_D).view(*share.shape[:3], -1)


class _Backward:
    """From the gradient by the sums of one group's attention to that by tokens and by queries."""

    def __init__(self, keys: Keys, attended: _Attended, by_summed: Tensor) -> None:
        self.group = attended.group
        self.queries = attended.cosine_NKQE, attended.sine_NKQE
        self._keys = keys
        self._share = attended.share_NKQS
        with torch.no_grad():
            self._mean = (by_summed * attended.summed_NKQD).sum(dim=-1, keepdim=True)
            self._gradient_NxD = (by_summed * keys.norm_D).flatten(1, 2)

    def _by_score(self, tile: Tile) -> Tensor:
        """By the scores `[N, K, Q, C]` of a tile's tokens."""
        by_share = torch.bmm(self._gradient_NxD, tile.unit.transpose(1, 2))
        by_share = by_share.view(*self._share.shape[:3], -1)
        return by_share.sub_(self._mean).mul_(self._share[..., tile.start : tile.stop])

    @torch.no_grad()
    def by_tokens(self, tile: Tile) -> Tensor:
        """By the hidden states `[N, C, D]` of a tile, times their root mean square."""
        by_normed = times(self._by_projected(tile), self._keys.key_weight)
        by_unit = by_normed.mul_(self._keys.norm_D).view_as(tile.unit)
        share = self._share[..., tile.start : tile.stop].flatten(1, 2)
        by_unit.baddbmm_(share.transpose(1, 2), self._gradient_NxD)
        # Backwards through the norm: the part along the token itself goes.
        along = (tile.unit * by_unit).mean(dim=-1, keepdim=True)
        return by_unit.addcmul_(tile.unit, along, value=-1)

    def _by_projected(self, tile: Tile) -> Tensor:
        """By the keys of a tile as the projection gives them, `[N * C, K * E]`."""
        keys, (cosine, sine) = self._keys, self.queries
        score_NKCQ = self._by_score(tile).transpose(2, 3)
        cos, sin = keys.angles(tile)
        by_key = torch.matmul(score_NKCQ, cosine).mul_(cos)
        by_key.addcmul_(torch.matmul(score_NKCQ, sine), sin)
        by_key_NCKE = by_key.transpose(1, 2)
        if keys.key_norm is not None:
            self._through_key_norm(tile, by_key_NCKE)
        return by_key_NCKE.flatten(0, 1).flatten(1)

    @torch.no_grad()
    def by_queries(self) -> tuple[Tensor, Tensor]:
        """By the queries for the cosine's part of the keys and by those for the sine's."""
        by_cosine, by_sine = (torch.zeros_like(query) for query in self.queries)
        for tile in self._keys.tiles(self.group):
            score = self._by_score(tile)
            keys, cos, sin = self._keys.unrotated(tile)
            by_cosine += torch.matmul(score, keys * cos)
            by_sine += torch.matmul(score, keys.mul_(sin))
        return by_cosine, by_sine

    def _through_key_norm(self, tile: Tile, by_key_NCKE: Tensor) -> None:
        """In place from the gradient by normed keys to that by projected ones, in which the part
        along the key itself is gone."""
        unit = self._keys.projected(tile)
        inverse = inverse_root(unit, self._keys.key_norm.variance_epsilon)
        unit.mul_(inverse)
        by_key_NCKE.mul_(self._keys.key_norm.weight.detach())
        along = (unit * by_key_NCKE).mean(dim=-1, keepdim=True)
        by_key_NCKE.addcmul_(unit, along, value=-1).mul_(inverse)
