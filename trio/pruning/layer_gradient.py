"""The stand-in for the decoder's result at one layer, and the gradient through it, the short way.

TRIO (arXiv 2602.04657), method section. The loss is read at a few rows. Only these need queries,
output projection, MLP, norm and head; every other token reaches them through its key and value in
this one layer. So autograd sees the rows alone, and what they do to all other tokens is written
out here: attention scores forwards, and backwards through keys (and their norm, where there is
one), values and the input norm.

Tokens are gone through in tiles, see `trio.pruning.tiled_attention`. Values are projected after
attention has summed up their inputs.

Shapes: T packed tokens, R proxy rows of all sequences, B sequences; in a group of neighbours N of
them with S tokens and P rows each, padded; C tokens of a tile; D hidden size, K key/value heads,
G query heads of each, H = K * G, Q = P * G, E head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trio.decoder.matmul import few_row_linears, linear, times
from trio.pruning.tiled_attention import (
    Group,
    Keys,
    Span,
    Tile,
    group_sequences,
    inverse_root,
    tile_tokens,
    turned,
)

if TYPE_CHECKING:
    from trio.decoder.decoder import Decoder


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
        self._tile_tokens = tile_tokens(decoder, batch_tokens)

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
            groups = group_sequences(rows, lengths, wanted, self._tile_tokens)
            with self._decoder.ragged():
                out = self._layer(
                    rows_RD[None],
                    attention_mask=None,
                    position_embeddings=(cos[:, index_R], sin[:, index_R]),
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


class _RowAttention:
    """As the attention of a layer: the rows' queries against all tokens, causal by row index."""

    def __init__(self, others: _Others, groups: Sequence[Group]) -> None:
        self._others = others
        self._groups = groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, R, E]` to `[1, R, H, E]`; the rows' own keys and values are not needed."""
        others = self._others
        query_RKGE = others.by_head(query, scale)
        pieces = []
        for group in self._groups:
            query_NPKGE = group.padded_rows(query_RKGE)
            shape = query_NPKGE.shape
            query_NKQE = query_NPKGE.transpose(1, 2).flatten(2, 3)
            summed = _Summed.apply(others, group, query_NKQE, turned(query_NKQE))
            assert isinstance(summed, Tensor)
            summed_NPKGD = summed.unflatten(2, (shape[1], shape[3])).transpose(1, 2)
            pieces.append(group.true_rows(summed_NPKGD))
        out_RKGE = others.project_values(torch.cat(pieces))
        return out_RKGE.flatten(1, 2)[None]


class _Summed(torch.autograd.Function):
    """Attention-weighted sums `[N, K, Q, D]` of normed hidden states, by queries `[N, K, Q, E]` for
    the cosine's part of the keys and such for the sine's."""

    @staticmethod
    def forward(ctx: Any, others: _Others, group: Group, cosine: Tensor, sine: Tensor) -> Tensor:
        share, summed = others.attend(group, cosine, sine)
        ctx.others, ctx.group = others, group
        ctx.save_for_backward(cosine, sine, share, summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.others.backward(ctx.group, *ctx.saved_tensors, gradients[0])


class _Others(Keys):
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
        super().__init__(layer, hidden_TD, cos_TE, sin_TE, dtype, tile_tokens)
        self._value = layer.self_attn.v_proj
        self._norms_T = hidden_TD.new_full(hidden_TD.shape[:1], float("nan"), dtype=dtype)
        self._at_rows: list[tuple[Tensor, Tensor]] = []
        """Of rows that are wanted tokens too: which ones, and their gradients as tokens."""

    def project_values(self, summed_RKGD: Tensor) -> Tensor:
        """Values `[R, K, G, E]` of sums of normed hidden states."""
        rows, _, group, _ = summed_RKGD.shape
        weight_KED = self._value.weight.detach().unflatten(0, (self.kv_heads, self._head_dim))
        out_KNE = linear(summed_RKGD.transpose(0, 1).flatten(1, 2), weight_KED)
        out_RKGE = out_KNE.unflatten(1, (rows, group)).transpose(0, 1)
        if self._value.bias is None:
            return out_RKGE
        return out_RKGE + self._value.bias.detach().view(self.kv_heads, 1, self._head_dim)

    def attend(self, group: Group, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of each row `[N, K, Q, S]`, summing to 1 over S, and by it the sums
        `[N, K, Q, D]` of normed hidden states."""
        one = list(self._tiles(group)) if group.longest <= self._step(group) else None
        share = self.shares(group, cosine, sine, one)
        flat = share.flatten(1, 2)
        summed = share.new_zeros(*flat.shape[:2], self._hidden_TD.shape[1])
        for tile in one or self._tiles(group):
            summed.baddbmm_(flat[..., tile.start : tile.stop], tile.unit)
        return share, summed.mul_(self._norm_D).view(*share.shape[:3], -1)

    def backward(
        self,
        group: Group,
        cosine: Tensor,
        sine: Tensor,
        share: Tensor,
        summed: Tensor,
        gradient: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Notes the norms of the wanted tokens' gradients; returns those of the queries, if any."""
        mean = (gradient * summed).sum(dim=-1, keepdim=True)
        gradient = (gradient * self._norm_D).flatten(1, 2)

        def by_score(tile: Tile) -> Tensor:
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

    def _note(self, group: Group, tile: Tile, gradient_NCD: Tensor) -> None:
        """`gradient_NCD`: of the tile's tokens, times their root mean square."""
        device = gradient_NCD.device
        norms_NC = torch.linalg.vector_norm(gradient_NCD, dim=-1) * tile.inverse[..., 0]
        self.spread(self._norms_T, group, tile.start, norms_NC)
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

    def _through_key_norm(self, tile: Tile, by_key_NCKE: Tensor) -> None:
        """In place from the gradient by normed keys to that by projected ones, in which the part
        along the key itself is gone."""
        unit = self._projected_keys(tile)
        inverse = inverse_root(unit, self._key_norm.variance_epsilon)
        unit.mul_(inverse)
        by_key_NCKE.mul_(self._key_norm.weight.detach())
        along = (unit * by_key_NCKE).mean(dim=-1, keepdim=True)
        by_key_NCKE.addcmul_(unit, along, value=-1).mul_(inverse)
