"""Choosing among an image's visual tokens in the encoder: windows of the image, then all of it.

Shapes: N tokens of an image, row by row, K of them that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def windows(rows: int, columns: int, edge: int, device: torch.device | None = None) -> Tensor:
    """In which window each token lies: windows of `edge` x `edge` tokens, row by row, those at the
    right and at the bottom as large as the image leaves them.

    Returns:
        `[N]`, numbers that rise from window to window.
    """
    row_N = torch.arange(rows, device=device).repeat_interleave(columns) // edge
    column_N = torch.arange(columns, device=device).repeat(rows) // edge
    return row_N * columns + column_N


def best_in_windows(scores_N: Tensor, window_N: Tensor, keep: int) -> Tensor:
    """The best tokens of each window, as evenly over windows as these are large.

    All windows give as many, a smaller one at most all that it has; of what is left over, one each
    to the windows whose best token that is left has the highest score. That is: all tokens that are
    first in their window, by score, then all that are second, and so on. Of equal scores the lower
    index comes first.

    Returns:
        `[keep]`, indices in that order.
    """
    order_N = scores_N.argsort(descending=True, stable=True)
    grouped_N = order_N[window_N[order_N].argsort(stable=True)]
    owner_N = window_N[grouped_N]
    rank_N = torch.empty_like(grouped_N)
    place_N = torch.arange(len(owner_N), device=owner_N.device)
    rank_N[grouped_N] = place_N - torch.searchsorted(owner_N, owner_N)
    return order_N[rank_N[order_N].argsort(stable=True)[:keep]]


def scan(shallow_N: Tensor, deep_N: Tensor, window_N: Tensor, keep: int) -> Tensor:
    """Half of the tokens by what a shallow layer attends to in each window, the others by what a
    deep one attends to in all that is left; of an odd number the deep layer has one more.

    The global-local scan of TRIO's reference (arXiv 2602.04657).

    Args:
        shallow_N: attention at the shallow layer.
        deep_N: attention at the deep layer.
        window_N: each token's window.
        keep: K, from 1 to N.

    Returns:
        `[K]` indices, rising.
    """
    local = best_in_windows(shallow_N, window_N, keep // 2)
    left_N = deep_N.index_fill(0, local, -torch.inf)
    rest = left_N.argsort(descending=True, stable=True)[: keep - len(local)]
    return torch.cat([local, rest]).sort().values
