"""Other methods by the book, as choices for `trio.pruning.reference.prefill`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.options import Pruning
from trio.pruning.reference import Rules, State, causal_mask, choose, order, score


def gradient(state: State, places: Tensor, keep: int) -> list[int]:
    return order(score(state)[places])[:keep]


def fastv(state: State, places: Tensor, keep: int) -> list[int]:
    assert state.entered_SD is not None
    attention = last_attention(state.text, state.layer - 1, state.entered_SD, state.positions)
    return order(attention[places])[:keep]


def divprune(state: State, places: Tensor, keep: int) -> list[int]:
    return far_apart(state.hidden_SD[places], keep)


def last_attention(text: Any, layer: int, hidden_SD: Tensor, positions: Tensor) -> Tensor:
    """Attention `[S]` that the last token pays in a layer, averaged over heads."""
    own = text.layers[layer]
    rotary = text.rotary_emb(hidden_SD, positions[..., None, :])
    with torch.no_grad():
        _, weights = own.self_attn(
            own.input_layernorm(hidden_SD[None]),
            attention_mask=causal_mask(hidden_SD),
            position_embeddings=rotary,
        )
    return weights[0, :, -1].mean(dim=0)


def far_apart(features_VD: Tensor, keep: int) -> list[int]:
    """Max-min distance by loops; indices in order of choice."""
    cosine = F.cosine_similarity(features_VD[:, None], features_VD, dim=-1).tolist()
    everyone = range(len(cosine))

    def isolation(token: int, others: list[int]) -> float:
        return min(1 - cosine[token][other] for other in others)

    chosen: list[int] = []
    while len(chosen) < keep:
        best, largest = -1, -1.0
        for token in everyone:
            others = chosen or [other for other in everyone if other != token]
            if token not in chosen and isolation(token, others) > largest:
                best, largest = token, isolation(token, others)
        chosen.append(best)
    return chosen


CHOOSE = {"trio": choose, "gradient": gradient, "fastv": fastv, "divprune": divprune}


def rules_of(pruning: Pruning, usual: str = "renumber") -> Rules:
    """usual: handling of positions where the settings leave it open."""
    return Rules(
        proxy_positions=pruning.proxy_positions,
        proxy_layer=pruning.proxy_layer,
        proxy_head=pruning.proxy_head,
        position_ids=pruning.position_ids or usual,
        similarity_threshold=pruning.similarity_threshold,
        fill_up=pruning.fill_up,
    )
