"""Method `fastv`: by the attention that the prompt's last token pays, in the layer just run.

FastV (arXiv 2403.06764), method section: average over heads, the largest stay. Its published
setting is one stage, `2:K`. At layer 0, where none has run, it is the attention in the first layer.
"""

from __future__ import annotations

from trio.pruning.candidates import Candidates, StageChoice


def by_attention(candidates: Candidates) -> StageChoice:
    """The tokens of the largest attention; of equal ones the lower index."""
    attention_T = candidates.attention(candidates.requests)
    order_NV = candidates.ranked(attention_T)
    kept_NK = order_NV[:, : candidates.most_kept]
    return candidates.choice(kept_NK, order_NV, finite_B=candidates.finite(attention_T))
