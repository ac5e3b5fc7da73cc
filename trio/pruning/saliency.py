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
from typing import Protocol

import torch
from torch import Tensor

# Rows that the loss is read at, counted from the end of the sequence.
_ROWS_FROM_END = {"reference": (5, 4, 3, 2), "with_last": (4, 3, 2, 1), "last": (1,)}


class Proxy(Protocol):
    """One decoder layer, final norm and head, at float32 or better."""

    dtype: torch.dtype

    def logits(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> Tensor:
        """Logits `[R, V]` of the given rows of each sequence, differentiable in `hidden_TD`."""
        ...


@dataclass(slots=True)
class Saliency:
    """Scores of every token, scaled per sequence so that none of them vanishes.

    scores_T: norm of the gradient of each sequence's own loss, times `exp(-log_scale)`.
    log_scale_B: natural logarithm of what the scores were divided by.
    loss_B: mean cross-entropy of each sequence against its own pseudo-labels.
    rows: the rows that each loss was read at.
    labels: the pseudo-labels there, `[R]`.
    """

    scores_T: Tensor
    log_scale_B: Tensor
    loss_B: Tensor
    rows: list[list[int]]
    labels_R: Tensor

    def true_scores(self, lengths: Sequence[int]) -> Tensor:
        """Unscaled gradient norms `[T]`; of a saturated loss these can be zero."""
        scale_B = self.log_scale_B.exp()
        counts = torch.tensor(lengths, device=scale_B.device)
        return self.scores_T * scale_B.repeat_interleave(counts)


def proxy_rows(length: int, positions: str) -> list[int]:
    """Row indices of the loss in a sequence; clamped at 0 and merged when it is short."""
    return sorted({max(0, length - back) for back in _ROWS_FROM_END[positions]})


def saliency(
    proxy: Proxy,
    hidden_TD: Tensor,
    positions_T: Tensor,
    lengths: Sequence[int],
    proxy_positions: str,
) -> Saliency:
    """Score all tokens of a packed batch.

    Args:
        proxy: stand-in for the decoder's result.
        hidden_TD: hidden states that enter the proxy's layer, packed, any floating dtype.
        positions_T: their positions.
        lengths: tokens of each sequence.
        proxy_positions: `reference`, `with_last` or `last`.
    """
    rows = [proxy_rows(length, proxy_positions) for length in lengths]
    # Inference tensors cannot take part in autograd, a copy made outside of that mode can.
    with torch.inference_mode(False), torch.enable_grad():
        leaf_TD = hidden_TD.detach().to(proxy.dtype, copy=True).requires_grad_()
        logits_RV = proxy.logits(leaf_TD, positions_T.clone(), rows, lengths)
        with torch.no_grad():
            sequence_R = torch.tensor(
                [number for number, own in enumerate(rows) for _ in own], device=leaf_TD.device
            )
            loss = _loss_gradient(logits_RV, sequence_R, len(rows))
        (grad_TD,) = torch.autograd.grad(logits_RV, leaf_TD, loss.gradient_RV)
    return Saliency(
        torch.linalg.vector_norm(grad_TD, dim=-1),
        loss.log_scale_B,
        loss.loss_B,
        rows,
        loss.labels_R,
    )


@dataclass(slots=True)
class _LossGradient:
    gradient_RV: Tensor
    log_scale_B: Tensor
    loss_B: Tensor
    labels_R: Tensor


def _loss_gradient(logits_RV: Tensor, sequence_R: Tensor, sequences: int) -> _LossGradient:
    """Gradient of each sequence's mean cross-entropy by its logits, largest entry scaled to 1.

    The gradient is probability minus one-hot. With a confident label the probabilities of all
    others underflow and that of the label cancels against 1, so both are taken from logarithms:
    the others relative to the largest of their sequence, the label as minus the sum of the others.
    """
    labels_R = logits_RV.argmax(dim=-1)
    log_p_RV = logits_RV.log_softmax(dim=-1)
    loss_R = -log_p_RV.gather(1, labels_R[:, None])[:, 0]
    log_p_RV = log_p_RV.scatter(1, labels_R[:, None], -math.inf)
    peak_B = logits_RV.new_full((sequences,), -math.inf)
    peak_B = peak_B.scatter_reduce(0, sequence_R, log_p_RV.amax(dim=-1), "amax")
    gradient_RV = (log_p_RV - peak_B[sequence_R][:, None]).exp()
    gradient_RV = gradient_RV.scatter(1, labels_R[:, None], -gradient_RV.sum(-1, keepdim=True))
    rows_B = torch.bincount(sequence_R, minlength=sequences)
    loss_B = torch.zeros_like(peak_B).index_add_(0, sequence_R, loss_R) / rows_B
    return _LossGradient(gradient_RV, peak_B - rows_B.log(), loss_B, labels_R)
