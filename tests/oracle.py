"""TRIO by the book, slow and one prompt at a time: what the fast version is judged by.

Whole next layer, whole head, autograd through everything, a sequential walk over a full cosine
matrix. Uses the layers of transformers with their own eager attention and a dense causal mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = {"reference": range(2, 6), "with_last": range(1, 5), "last": range(1, 2)}


def text_parts(model: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A copy of a LLaVA's decoder and head in another precision, with eager attention."""
    text = copy.deepcopy(model.model.language_model).to(dtype)
    text.config = copy.deepcopy(text.config)
    text.config._attn_implementation = "eager"
    for layer in text.layers:
        layer.self_attn.config = text.config
    return text, copy.deepcopy(model.lm_head).to(dtype)


def embedding_head(text: Any) -> Any:
    """Logits are the products with the embedding of each token."""
    return lambda hidden: hidden @ text.embed_tokens.weight.T


def run_layer(text: Any, layer: int, hidden_SD: Tensor, positions_S: Tensor) -> Tensor:
    size = hidden_SD.shape[0]
    mask = torch.full((size, size), -torch.inf, dtype=hidden_SD.dtype).triu(1)[None, None]
    rotary = text.rotary_emb(hidden_SD, positions_S[..., None, :])
    return text.layers[layer](hidden_SD[None], attention_mask=mask, position_embeddings=rotary)[0]


def proxy_logits(
    text: Any, head: Any, layer: int, hidden_SD: Tensor, positions_S: Tensor
) -> Tensor:
    return head(text.norm(run_layer(text, layer, hidden_SD, positions_S)))


def saliency(
    text: Any, head: Any, layer: int, hidden_SD: Tensor, positions_S: Tensor, proxy_positions: str
) -> tuple[Tensor, Tensor]:
    """Gradient norms `[S]` of the proxy loss, and the loss."""
    hidden_SD = hidden_SD.detach().clone().requires_grad_()
    logits = proxy_logits(text, head, layer, hidden_SD, positions_S)
    size = hidden_SD.shape[0]
    rows = sorted({max(0, size - back) for back in ROWS[proxy_positions]})
    chosen = logits[rows]
    loss = F.cross_entropy(chosen, chosen.argmax(-1).detach())
    (gradient,) = torch.autograd.grad(loss, hidden_SD)
    return gradient.norm(dim=-1), loss.detach()


def order(scores: Tensor) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def walk(
    features_VD: Tensor,
    ranked: list[int],
    keep: int,
    threshold: float,
    fill_up: str = "reference",
    coordinates_V2: Tensor | None = None,
) -> list[int]:
    normed = F.normalize(features_VD.float(), dim=-1)
    cosine = (normed @ normed.T).tolist()
    if coordinates_V2 is None:
        coordinates_V2 = torch.zeros(len(normed), 2)
    apart = torch.cdist(coordinates_V2.double(), coordinates_V2.double())
    near = (normed.double() @ normed.double().T + 0.3 * (-4.5 * apart**2).exp()).tolist()
    kept: list[int] = []
    suppressed = set()
    for token in ranked:
        if len(kept) == keep:
            break
        if token in suppressed:
            continue
        kept.append(token)
        suppressed |= {other for other in ranked if cosine[token][other] >= threshold}
    missing = keep - len(kept)
    salient = len(kept) + {"reference": missing, "mixed": missing // 4}[fill_up]
    while len(kept) < keep:
        left = [token for token in ranked if token not in kept]
        if len(kept) >= salient:
            kept.append(min(left, key=lambda token: max(near[token][own] for own in kept)))
        else:
            kept.append(left[0])
    return sorted(kept)


def last_attention(text: Any, layer: int, hidden_SD: Tensor, positions_S: Tensor) -> Tensor:
    """Attention `[S]` that the last token pays in a layer, averaged over heads."""
    own = text.layers[layer]
    size = hidden_SD.shape[0]
    mask = torch.full((size, size), -torch.inf, dtype=hidden_SD.dtype).triu(1)[None, None]
    rotary = text.rotary_emb(hidden_SD, positions_S[..., None, :])
    with torch.no_grad():
        _, weights = own.self_attn(
            own.input_layernorm(hidden_SD[None]), attention_mask=mask, position_embeddings=rotary
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


@dataclass
class Outcome:
    logits_V: Tensor
    kept: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    next_positions: list[int] = field(default_factory=list)


def prefill(
    text: Any,
    head: Any,
    embeds_SD: Tensor,
    spans: list[tuple[int, int]],
    stages: list[list[tuple[int, int]]],
    *,
    proxy_positions: str = "reference",
    proxy_layer: str = "next",
    proxy_head: str = "output",
    position_ids: str = "renumber",
    threshold: float = 0.8,
    method: str = "trio",
    fill_up: str = "mixed",
    positions: Tensor | None = None,
    coordinates: Tensor | None = None,
    injected: Sequence[Tensor] = (),
) -> Outcome:
    """One prompt with `stages[image]` of each of its images, through all layers.

    positions: `[S]`, or `[A, S]` on several axes; None is 0, 1, 2, ...
    coordinates: `[S, 2]`; None is unknown.
    injected: `[V, D]` each, added to the visual tokens that leave the first layers.
    """
    hidden = embeds_SD.detach()
    if positions is None:
        positions = torch.arange(hidden.shape[0])
    behind = int(positions.max()) + 1
    if coordinates is None:
        coordinates = torch.zeros(hidden.shape[0], 2)
    image_of = torch.full((hidden.shape[0],), -1)
    token_of = torch.full((hidden.shape[0],), -1)
    count = 0
    for image, (start, stop) in enumerate(spans):
        image_of[start:stop] = image
        token_of[start:stop] = torch.arange(count, count + stop - start)
        count += stop - start
    entered = hidden
    out = Outcome(logits_V=torch.empty(0))
    back = {"next": 0, "previous": 1}[proxy_layer]
    scoring_head = {"output": head, "input_embedding": embedding_head(text)}[proxy_head]
    for layer in range(len(text.layers) + 1):
        goals = [dict(own).get(layer) for own in stages]
        if any(goal is not None for goal in goals):
            if method == "fastv":
                scores = last_attention(text, layer - 1, entered, positions)
            else:
                scores, _ = saliency(
                    text, scoring_head, layer - back, hidden, positions, proxy_positions
                )
            stays = torch.ones(hidden.shape[0], dtype=torch.bool)
            for image, goal in enumerate(goals):
                places = (image_of == image).nonzero()[:, 0]
                if goal is None or goal >= len(places):
                    continue
                ranked = order(scores[places])
                features = hidden[places]
                picks = ranked[:goal]
                if method == "trio":
                    own = coordinates[places]
                    picks = walk(features, ranked, goal, threshold, fill_up, own)
                if method == "divprune":
                    picks = far_apart(features, goal)
                stays[places] = False
                stays[places[picks]] = True
            hidden, positions = hidden[stays], positions[..., stays]
            coordinates = coordinates[stays]
            image_of, token_of = image_of[stays], token_of[stays]
            if position_ids == "renumber":
                positions = torch.arange(hidden.shape[0]).expand_as(positions)
                behind = hidden.shape[0]
            out.kept.append(token_of[token_of >= 0].tolist())
        if layer == len(text.layers):
            break
        out.lengths.append(hidden.shape[0])
        out.next_positions.append(behind)
        entered = hidden
        with torch.no_grad():
            hidden = run_layer(text, layer, hidden, positions)
            if layer < len(injected):
                for place, token in enumerate(token_of.tolist()):
                    if token >= 0:
                        hidden[place] += injected[layer][token]
    with torch.no_grad():
        out.logits_V = head(text.norm(hidden[-1]))
    return out
