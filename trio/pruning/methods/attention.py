"""Method `fastv`: by the attention that the prompt's last token pays, in the layer just run.

FastV (arXiv 2403.06764), method section: average over heads, the largest stay. Its published
setting is one stage, `2:K`. At layer 0, where none has run, it is the attention in the first layer.
"""

from __future__ import annotations

from trio.pruning.candidates import Candidates, StageChoice


def by_attention(candidates: Candidates) -> StageChoice:
    """The tokens of the largest attention; of equal ones the lower index."""
    order_NV = candidates.ranked(candidates.attention(candidates.requests))
    return candidates.choice(order_NV[:, : candidates.most_kept], order_NV)
