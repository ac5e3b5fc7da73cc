"""Which visual tokens of a packed batch stay at a stage: every method by its name.

Shapes: T packed tokens, A axes of positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trio.pruning.batch import Ragged
from trio.pruning.candidates import Candidates, Relevance, StageChoice
from trio.pruning.methods.attention import by_attention
from trio.pruning.methods.diversity import by_diversity
from trio.pruning.methods.gradient import by_saliency, by_saliency_and_distance
from trio.pruning.methods.random import at_random
from trio.pruning.methods.relevance import by_relevance
from trio.pruning.options import Pruning
from trio.pruning.saliency import Proxy

Method = Callable[[Candidates], StageChoice]

METHODS: dict[str, Method] = {
    "trio": by_saliency_and_distance,
    "gradient": by_saliency,
    "random": at_random,
    "fastv": by_attention,
    "divprune": by_diversity,
    "eadp": by_relevance,
}
"""By the names that `trio.Pruning` knows; `none` has no stages."""

LOOKS_BACK = ("fastv",)
"""Methods that ask for the attention in the layer that has just run."""


def choose(
    pruning: Pruning,
    proxy: Callable[[], Proxy],
    hidden_TD: Tensor,
    positions_T: Tensor,
    ragged: Ragged,
    keeps: Sequence[Sequence[int] | None],
    *,
    coordinates_T2: Tensor,
    salts: Sequence[int],
    layer: int,
    attention: Callable[[Sequence[int]], Tensor] | None = None,
    relevance: Sequence[Sequence[Relevance]] = (),
) -> StageChoice | None:
    """Choose the tokens of one stage.

    Args:
        pruning: method and settings.
        proxy: makes the stage's proxy, called only by methods that score with it.
        hidden_TD: packed hidden states that leave the layer before the stage.
        positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
        ragged: lengths and images at present.
        keeps: for each request the tokens to keep of each image; None has no stage here.
        coordinates_T2: where in its picture each visual token lies, in edges of a square as large
            as the picture; all alike where that is unknown.
        salts: per request, for `random`.
        layer: layers that have run.
        attention: for `LOOKS_BACK`: from some requests, rising, to the attention `[T]` that their
            tokens get from the last one of their prompt in the layer that has just run.
        relevance: of each request's images, for `eadp`.

    Returns:
        The choice, or None if no image loses a token.

    Raises:
        UserError: the method needs something that the model does not have.
    """
    goals = {
        (request, number): keep
        for request, own in enumerate(keeps)
        for number, keep in enumerate(own or ())
        if keep < ragged.images[request][number].count
    }
    if not goals:
        return None
    candidates = Candidates(
        pruning=pruning,
        layer=layer,
        hidden_TD=hidden_TD,
        positions_T=positions_T,
        coordinates_T2=coordinates_T2,
        ragged=ragged,
        goals=goals,
        salts=salts,
        proxy=proxy,
        attention=attention or _nothing,
        relevance=relevance,
    )
    # A caller's autocast would score in half precision, and scores would collide.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return METHODS[pruning.method](candidates)


def _nothing(requests: Sequence[int]) -> Tensor:
    raise AssertionError("nothing was said of attention")
