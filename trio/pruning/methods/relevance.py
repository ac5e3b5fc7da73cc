"""Method `eadp`: tokens that together resemble what matters for the prompt.

EADP (arXiv 2607.02484), method section. What matters is told by the encoder's joint space of images
and texts, before the decoder; here it comes with the prompts.
"""

from __future__ import annotations

import importlib

import torch

from trio.errors import UserError
from trio.pruning.candidates import Candidates, Relevance, StageChoice

NO_TEXT_TOWER = (
    "method eadp compares images with prompts by the text tower that belongs to the vision "
    "encoder, and there is none here: use another method"
)


def by_relevance(candidates: Candidates) -> StageChoice:
    """Greedy facility location over the importance of each image's tokens.

    Raises:
        UserError: nothing is known of what matters.
    """
    if not candidates.relevance:
        raise UserError(NO_TEXT_TOWER)
    picks, orders = {}, {}
    for (request, number), keep in candidates.goals.items():
        own = candidates.relevance[request][number]
        order_K = _select(own, keep)
        orders[request, number] = order_K
        picks[request, number] = sorted(order_K.tolist())
    return StageChoice(candidates.by_request(picks), [], None, orders)


def _select(own: Relevance, keep: int) -> torch.Tensor:
    eadp = importlib.import_module("trio.pruning.eadp")
    order_K: torch.Tensor = eadp.select(own.importance_N, own.features_NP, keep)
    return order_K
