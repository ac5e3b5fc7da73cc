"""TRIO by the book: what the fast version is held against, and the method to read first.

TRIO (arXiv 2602.04657), method section, one prompt at a time and slowly: the whole next layer, the
whole head, autograd through all of it, a sequential walk over a full cosine matrix. Runs the layers
of transformers with their own eager attention and a dense causal mask. Nothing of the product
imports it.

Shapes: S tokens of the prompt that are left, V visual tokens of one image, D hidden size, A axes of
positions, U vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BACK = {"reference": range(2, 6), "with_last": range(1, 5), "last": range(1, 2)}
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """As the fields of `trio.Pruning` with these names."""

    proxy_positions: str = "reference"
    proxy_layer: str = "next"
    proxy_head: str = "output"
    position_ids: str = "renumber"
    similarity_threshold: float = 0.8
    fill_up: str = "mixed"


@dataclass
class State:
    """A prompt on its way through the decoder."""

    text: Any
    """The text decoder, with eager attention."""
    head: Any
    """Its output head."""
    rules: Rules
    hidden_SD: Tensor
    positions: Tensor
    """`[S]`, or `[A, S]` on several axes."""
    coordinates_S2: Tensor
    """Where in its picture each visual token lies."""
    token_S: Tensor
    """Number of each visual token as they entered; -1 for text."""
    image_S: Tensor
    """Number of each visual token's image; -1 for text."""
    behind: int
    """Position of the token that will follow."""
    layer: int = 0
    """Layers that have run."""
    entered_SD: Tensor | None = None
    """What entered the last of them."""


@dataclass
class Outcome:
    logits_U: Tensor
    kept: list[list[int]] = field(default_factory=list)
    """Visual tokens left after each stage."""
    lengths: list[int] = field(default_factory=list)
    """Tokens in each layer."""
    next_positions: list[int] = field(default_factory=list)
    """Position of the next token in each layer."""


def text_parts(model: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A copy of a model's text decoder and head in another precision, with eager attention."""
    text = copy.deepcopy(model.model.language_model).to(dtype)
    text.config = copy.deepcopy(text.config)
    text.config._attn_implementation = "eager"
    for layer in text.layers:
        layer.self_attn.config = text.config
    return text, copy.deepcopy(model.lm_head).to(dtype)


def causal_mask(like_SD: Tensor) -> Tensor:
    size = like_SD.shape[0]
    return torch.full((size, size), -torch.inf, dtype=like_SD.dtype).triu(1)[None, None]


def run_layer(text: Any, layer: int, hidden_SD: Tensor, positions: Tensor) -> Tensor:
    """Hidden states `[S, D]` that leave a layer."""
    rotary = text.rotary_emb(hidden_SD, positions[..., None, :])
    mask = causal_mask(hidden_SD)
    return text.layers[layer](hidden_SD[None], attention_mask=mask, position_embeddings=rotary)[0]


def embedding_head(text: Any) -> Callable[[Tensor], Tensor]:
    """Logits are the products with the embedding of each token."""
    return lambda hidden: hidden @ text.embed_tokens.weight.T


def proxy_logits(text: Any, head: Any, layer: int, hidden_SD: Tensor, positions: Tensor) -> Tensor:
    """The stand-in for the result: one more layer, the final norm, the head."""
    return head(text.norm(run_layer(text, layer, hidden_SD, positions)))


def saliency(
    text: Any, head: Any, layer: int, hidden_SD: Tensor, positions: Tensor, proxy_positions: str
) -> tuple[Tensor, Tensor]:
    """Gradient norms `[S]` of the loss against the proxy's own labels, and the loss."""
    hidden_SD = hidden_SD.detach().clone().requires_grad_()
    logits = proxy_logits(text, head, layer, hidden_SD, positions)
    size = hidden_SD.shape[0]
    rows = sorted({max(0, size - back) for back in _BACK[proxy_positions]})
    loss = F.cross_entropy(logits[rows], logits[rows].argmax(-1).detach())
    (gradient_SD,) = torch.autograd.grad(loss, hidden_SD)
    return gradient_SD.norm(dim=-1), loss.detach()


def order(scores: Tensor) -> list[int]:
    """Highest score first; of equal ones the lower index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def suppress(
    cosine: list[list[float]], ranked: list[int], keep: int, threshold: float
) -> list[int]:
    """Walk down the order; keep a token unless one that is kept resembles it."""
    kept: list[int] = []
    for token in ranked:
        if len(kept) < keep and all(cosine[token][own] < threshold for own in kept):
            kept.append(token)
    return kept


def fill_up(
    near: list[list[float]], ranked: list[int], kept: list[int], keep: int, rule: str
) -> list[int]:
    """What is missing: some by saliency, the rest by farthest-point sampling."""
    missing = keep - len(kept)
    salient = len(kept) + {"reference": missing, "mixed": missing // 4}[rule]
    kept = list(kept)
    while len(kept) < keep:
        left = [token for token in ranked if token not in kept]
        if len(kept) < salient:
            kept.append(left[0])
        else:
            kept.append(min(left, key=lambda token: max(near[token][own] for own in kept)))
    return kept


def walk(
    features_VD: Tensor,
    ranked: list[int],
    keep: int,
    threshold: float,
    rule: str = "reference",
    coordinates_V2: Tensor | None = None,
) -> list[int]:
    """Suppression and fill-up; the tokens that stay, rising."""
    unit_VD = F.normalize(features_VD.float(), dim=-1)
    if coordinates_V2 is None:
        coordinates_V2 = torch.zeros(len(unit_VD), 2)
    apart = torch.cdist(coordinates_V2.double(), coordinates_V2.double())
    near = unit_VD.double() @ unit_VD.double().T + 0.3 * (-4.5 * apart**2).exp()
    kept = suppress((unit_VD @ unit_VD.T).tolist(), ranked, keep, threshold)
    return sorted(fill_up(near.tolist(), ranked, kept, keep, rule))


def score(state: State) -> Tensor:
    """Saliency `[S]` at a stage."""
    rules = state.rules
    layer = state.layer - (rules.proxy_layer == "previous")
    head = state.head if rules.proxy_head == "output" else embedding_head(state.text)
    scores_S, _ = saliency(
        state.text, head, layer, state.hidden_SD, state.positions, rules.proxy_positions
    )
    return scores_S


def choose(state: State, places: Tensor, keep: int) -> list[int]:
    """Of the tokens of one image, at `places` of the prompt, those that TRIO keeps."""
    return walk(
        state.hidden_SD[places],
        order(score(state)[places]),
        keep,
        state.rules.similarity_threshold,
        state.rules.fill_up,
        state.coordinates_S2[places],
    )


def compact(state: State, stays_S: Tensor) -> None:
    """Take the others out of the prompt."""
    state.hidden_SD, state.positions = state.hidden_SD[stays_S], state.positions[..., stays_S]
    state.coordinates_S2 = state.coordinates_S2[stays_S]
    state.token_S, state.image_S = state.token_S[stays_S], state.image_S[stays_S]
    if state.rules.position_ids == "renumber":
        size = len(state.hidden_SD)
        state.positions, state.behind = torch.arange(size).expand_as(state.positions), size


def prefill(
    text: Any,
    head: Any,
    embeds_SD: Tensor,
    spans: Sequence[Span],
    stages: Sequence[Sequence[tuple[int, int]]],
    rules: Rules | None = None,
    *,
    choose: Callable[[State, Tensor, int], list[int]] = choose,
    positions: Tensor | None = None,
    coordinates: Tensor | None = None,
    injected: Sequence[Tensor] = (),
) -> Outcome:
    """One prompt through all layers.

    Args:
        text: as of `text_parts`, like the next.
        head: hidden states to logits.
        embeds_SD: the prompt's embeddings and visual features.
        spans: where each image's tokens stand.
        stages: for each image `(layer, tokens to keep)`.
        rules: of the method.
        choose: another method.
        positions: None is 0, 1, 2, ...
        coordinates: `[S, 2]`; None is unknown.
        injected: `[V, D]` each, added to the visual tokens that leave the first layers.
    """
    state = _entered(text, head, embeds_SD, spans, rules or Rules(), positions, coordinates)
    out = Outcome(logits_U=torch.empty(0))
    for layer in range(len(text.layers) + 1):
        state.layer = layer
        keeps = [dict(own).get(layer) for own in stages]
        if any(keep is not None for keep in keeps):
            stays_S = torch.ones(len(state.hidden_SD), dtype=torch.bool)
            for image, keep in enumerate(keeps):
                places = (state.image_S == image).nonzero()[:, 0]
                if keep is not None and keep < len(places):
                    stays_S[places] = False
                    stays_S[places[choose(state, places, keep)]] = True
            compact(state, stays_S)
            out.kept.append(state.token_S[state.token_S >= 0].tolist())
        if layer < len(text.layers):
            out.lengths.append(len(state.hidden_SD))
            out.next_positions.append(state.behind)
            _run(state, layer, injected)
    with torch.no_grad():
        out.logits_U = head(text.norm(state.hidden_SD[-1]))
    return out


def _entered(
    text: Any,
    head: Any,
    embeds_SD: Tensor,
    spans: Sequence[Span],
    rules: Rules,
    positions: Tensor | None,
    coordinates: Tensor | None,
) -> State:
    size = len(embeds_SD)
    positions = torch.arange(size) if positions is None else positions
    image_S = torch.full((size,), -1)
    for image, (start, stop) in enumerate(spans):
        image_S[start:stop] = image
    visual_S = image_S >= 0
    return State(
        text=text,
        head=head,
        rules=rules,
        hidden_SD=embeds_SD.detach(),
        positions=positions,
        coordinates_S2=torch.zeros(size, 2) if coordinates is None else coordinates,
        token_S=(visual_S.cumsum(0) - 1).where(visual_S, -1),
        image_S=image_S,
        behind=int(positions.max()) + 1,
    )


@torch.no_grad()
def _run(state: State, layer: int, injected: Sequence[Tensor]) -> None:
    state.entered_SD = state.hidden_SD
    state.hidden_SD = run_layer(state.text, layer, state.hidden_SD, state.positions)
    if layer < len(injected):
        for place, token in enumerate(state.token_S.tolist()):
            if token >= 0:
                state.hidden_SD[place] += injected[layer][token]
