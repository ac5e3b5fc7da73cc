"""Gradient saliency of every token with respect to a layer-local proxy of the result.

TRIO (arXiv 2602.04657), method section. Exactly the textbook gradient: the loss is read at a few
rows, so only these need queries, MLP, norm and head; all other tokens reach it through their keys
and values alone.

Shapes: T packed tokens, R proxy rows of all sequences, B sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trio.decoder.gpu import sent
from trio.pruning.scores.layer_gradient import LayerGradient

# Rows that the loss is read at, counted from the end of the sequence.
_ROWS_FROM_END = {"reference": (5, 4, 3, 2), "with_last": (4, 3, 2, 1), "last": (1,)}


@dataclass(slots=True)
class Saliency:
    """Scores of tokens, scaled per sequence so that none of them vanishes."""

    scores_T: Tensor
    """Norm of the gradient of each sequence's own loss, times `exp(-log_scale)`; NaN at tokens that
    were not wanted."""
    log_scale_B: Tensor
    """Natural logarithm of what the scores were divided by."""
    loss_B: Tensor
    """Mean cross-entropy of each sequence against its own pseudo-labels."""
    rows: list[list[int]]
    """The rows that each loss was read at."""
    labels_R: Tensor
    """The pseudo-labels there."""

    def true_scores(self, lengths: Sequence[int]) -> Tensor:
        """Unscaled gradient norms `[T]`; of a saturated loss these can be zero."""
        scale_B = self.log_scale_B.exp()
        counts = torch.tensor(lengths, device=scale_B.device)
        return self.scores_T * scale_B.repeat_interleave(counts)


def proxy_index(layer: int, proxy_layer: str) -> int:
    """The decoder layer (0-based) that scores at a stage behind `layer` layers."""
    return layer - 1 if proxy_layer == "previous" else layer


def proxy_rows(length: int, positions: str) -> list[int]:
    """Row indices of the loss in a sequence; clamped at 0 and merged when it is short."""
    return sorted({max(0, length - back) for back in _ROWS_FROM_END[positions]})


@torch.no_grad()
def saliency(
    proxy: LayerGradient,
    hidden_TD: Tensor,
    positions_T: Tensor,
    lengths: Sequence[int],
    proxy_positions: str,
    wanted: Sequence[tuple[int, int]] | None = None,
) -> Saliency:
    """Score the tokens of a packed batch.

    Args:
        proxy: stand-in for the decoder's result.
        hidden_TD: hidden states that enter the proxy's layer, packed, any floating dtype.
        positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
        lengths: tokens of each sequence.
        proxy_positions: `reference`, `with_last` or `last`.
        wanted: for each sequence the tokens `(start, stop)` to score; None scores all.
    """
    rows = [proxy_rows(length, proxy_positions) for length in lengths]
    if wanted is None:
        wanted = [(0, length) for length in lengths]
    counts_B = torch.tensor([len(own) for own in rows])
    sequence_R = torch.arange(len(rows)).repeat_interleave(counts_B)
    forward = proxy.forward(hidden_TD, positions_T, rows, lengths, wanted)
    device = hidden_TD.device
    loss = _loss_gradient(forward.logits_RV, sent(sequence_R, device), sent(counts_B, device))
    scores_T = forward.gradient_norms(loss.gradient_RV, loss.factor_R)
    return Saliency(scores_T, loss.log_scale_B, loss.loss_B, rows, loss.labels_R)


@dataclass(slots=True)
class _LossGradient:
    """The gradient is `gradient_RV * factor_R[:, None]`, times `exp(log_scale)` of its sequence."""

    gradient_RV: Tensor
    factor_R: Tensor
    log_scale_B: Tensor
    loss_B: Tensor
    labels_R: Tensor


def _loss_gradient(logits_RV: Tensor, sequence_R: Tensor, counts_B: Tensor) -> _LossGradient:
    """Gradient of each sequence's mean cross-entropy by its logits, largest entry scaled to 1.

    The gradient is probability minus one-hot. With a confident label the probabilities of all
    others underflow and that of the label cancels against 1, so both are taken relative to the
    largest of the others in their sequence: the label as minus the sum of the others. The logits
    are overwritten: at their size each pass over them counts.
    """
    top_R1, label_R1 = logits_RV.max(dim=-1, keepdim=True)
    logits_RV.scatter_(1, label_R1, -math.inf)
    second_R1 = logits_RV.amax(dim=-1, keepdim=True)
    others_RV = logits_RV.sub_(second_R1).exp_()
    sum_R1 = others_RV.sum(dim=-1, keepdim=True)
    gradient_RV = others_RV.scatter_(1, label_R1, -sum_R1)
    gap_R = (second_R1 - top_R1)[:, 0]
    loss_R = torch.log1p(sum_R1[:, 0] * gap_R.exp())
    log_peak_R = gap_R - loss_R
    nothing_B = loss_R.new_zeros(counts_B.shape)
    peak_B = nothing_B.scatter_reduce(0, sequence_R, log_peak_R, "amax", include_self=False)
    loss_B = nothing_B.index_add_(0, sequence_R, loss_R).div_(counts_B)
    factor_R = (log_peak_R - peak_B[sequence_R]).exp_()
    log_scale_B = peak_B - counts_B.to(loss_R.dtype).log()
    return _LossGradient(gradient_RV, factor_R, log_scale_B, loss_B, label_R1[:, 0])
