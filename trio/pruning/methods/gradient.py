"""Methods `trio` and `gradient`: by how a loss at the next layer depends on each token.

TRIO (arXiv 2602.04657), method section; `gradient` leaves the suppression of near-duplicates out.
"""

from __future__ import annotations

from trio.pruning.candidates import Candidates, StageChoice
from trio.pruning.nms import suppress
from trio.pruning.saliency import Saliency, saliency


def by_saliency(candidates: Candidates) -> StageChoice:
    """The tokens of the largest gradients, whether they resemble each other or not."""
    scores = _scored(candidates)
    order_NV = candidates.ranked(scores.scores_T)
    finite_B = candidates.finite(scores.scores_T)
    return candidates.choice(order_NV[:, : candidates.most_kept], order_NV, scores, finite_B)


def by_saliency_and_distance(candidates: Candidates) -> StageChoice:
    """The tokens of the largest gradients, without those too near to one that is kept."""
    scores = _scored(candidates)
    order_NV = candidates.ranked(scores.scores_T)
    start_N, count_N, keep_N = candidates.bounds
    hidden_TD, _, coordinates_T2 = candidates.packed
    kept_NK = suppress(
        hidden_TD,
        coordinates_T2,
        start_N,
        count_N,
        order_NV,
        keep_N,
        candidates.most_kept,
        candidates.pruning.similarity_threshold,
        candidates.pruning.fill_up,
    )
    return candidates.choice(kept_NK, order_NV, scores, candidates.finite(scores.scores_T))


def _scored(candidates: Candidates) -> Saliency:
    hidden_TD, positions_T, _ = candidates.packed
    spans = [candidates.spans(request) for request in candidates.requests]
    return saliency(
        candidates.proxy(),
        hidden_TD,
        positions_T,
        candidates.lengths,
        candidates.pruning.proxy_positions,
        [(min(own)[0], max(own)[1]) for own in spans],
    )
