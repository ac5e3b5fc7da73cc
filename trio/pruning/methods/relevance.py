"""Method `eadp`: tokens that together resemble what matters for the prompt.

EADP (arXiv 2607.02484), method section. What matters is told by the space that the encoder shares
with its text tower, before the decoder; here it comes with the prompts. Tokens resemble each other
by what enters the decoder, as in the published code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trio.errors import UserError
from trio.pruning.candidates import Candidates, Relevance, StageChoice
from trio.pruning.eadp import select, select_by_tile
from trio.pruning.finite import finite_rows


def by_relevance(candidates: Candidates) -> StageChoice:
    """Greedy facility location over the importance of each image's tokens.

    Raises:
        UserError: nothing is known of what matters.
    """
    if not candidates.relevance:
        raise UserError(
            "method eadp compares images with prompts by the text tower that belongs to the vision "
            "encoder, and there is none here: use another method"
        )
    hidden_TD, *_ = candidates.packed
    starts, counts, _ = candidates.bounds
    picks, orders = {}, {}
    for ((request, number), keep), start, count in zip(
        candidates.goals.items(), starts.tolist(), counts.tolist(), strict=True
    ):
        own = candidates.relevance[request][number]
        order_K = _select(own, hidden_TD[start : start + count], keep)
        orders[request, number] = order_K
        picks[request, number] = sorted(order_K.tolist())
    importance = [candidates.relevance[r][i].importance_N for r, i in candidates.goals]
    finite_N = torch.stack([finite_rows(own_N) for own_N in importance])
    kept, finite_B = candidates.by_request(picks), candidates.by_image(finite_N)
    return StageChoice(kept, [], None, orders, finite_B)


def _select(own: Relevance, features_ND: Tensor, keep: int) -> Tensor:
    if own.tile_N is None:
        return select(own.importance_N, features_ND, keep)
    by_tile_N = own.tile_N.argsort(stable=True)
    sizes = torch.bincount(own.tile_N).tolist()
    index_N = by_tile_N.to(features_ND.device)
    order_K = select_by_tile(own.importance_N[index_N], features_ND[index_N], sizes, keep)
    return index_N[order_K]
