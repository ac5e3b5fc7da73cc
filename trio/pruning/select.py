"""Which visual tokens of a packed batch stay at a stage.

Shapes: T packed tokens, N images, V visual tokens of the widest one, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trio.config import Pruning
from trio.pruning.compaction import Image, Kept, Ragged
from trio.pruning.nms import suppress
from trio.pruning.saliency import Proxy, Saliency, saliency


@dataclass(slots=True)
class StageChoice:
    """What a stage decided.

    kept: for each request and image the local indices that stay; None where nothing goes.
    scored: the requests that were scored, in order; empty for methods without scores.
    saliency: scores of these requests' tokens, packed.
    orders: for each pruned image, as `(request, image)`, its local indices by falling score.
    """

    kept: Kept
    scored: list[int]
    saliency: Saliency | None
    orders: dict[tuple[int, int], Tensor]


def choose(
    pruning: Pruning,
    proxy: Callable[[], Proxy],
    hidden_TD: Tensor,
    positions_T: Tensor,
    ragged: Ragged,
    keeps: Sequence[Sequence[int] | None],
    *,
    salts: Sequence[int],
    layer: int,
) -> StageChoice | None:
    """Choose the tokens of one stage.

    Args:
        pruning: method and settings.
        proxy: makes the stage's proxy, called only if scores are needed.
        hidden_TD: packed hidden states that leave the layer before the stage.
        positions_T: their positions, `[T]` or, on several axes, `[A, T]`.
        ragged: lengths and images at present.
        keeps: for each request the tokens to keep of each image; None has no stage here.
        salts: per request, for `random`.
        layer: layers that have run.

    Returns:
        The choice, or None if no image loses a token.
    """
    pruned = [
        (request, number)
        for request, own in enumerate(keeps)
        for number, keep in enumerate(own or ())
        if keep < ragged.images[request][number].count
    ]
    if not pruned:
        return None
    goals = {(r, i): (keeps[r] or ())[i] for r, i in pruned}
    if pruning.method == "random":
        picks = {
            (r, i): _random(ragged.images[r][i], goal, pruning.seed, salts[r], layer, i)
            for (r, i), goal in goals.items()
        }
        return StageChoice(_by_request(ragged, picks), [], None, {})
    # A caller's autocast would score in half precision, and scores would collide.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _by_saliency(pruning, proxy(), hidden_TD, positions_T, ragged, goals)


def salt_of(token_ids: Sequence[int]) -> int:
    """A number that depends on a request's tokens alone, so that no batch changes its choice."""
    text = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _by_saliency(
    pruning: Pruning,
    proxy: Proxy,
    hidden_TD: Tensor,
    positions_T: Tensor,
    ragged: Ragged,
    goals: dict[tuple[int, int], int],
) -> StageChoice:
    scored = sorted({request for request, _ in goals})
    lengths = [ragged.lengths[request] for request in scored]
    if len(scored) < len(ragged.lengths):
        index = torch.cat(
            [torch.arange(n) + ragged.starts[r] for r, n in zip(scored, lengths, strict=True)]
        ).to(hidden_TD.device)
        hidden_TD, positions_T = hidden_TD[index], positions_T[..., index]
    spans = [[ragged.images[r][i].span for r, i in goals if r == request] for request in scored]
    wanted = [(min(own)[0], max(own)[1]) for own in spans]
    result = saliency(proxy, hidden_TD, positions_T, lengths, pruning.proxy_positions, wanted)
    first = dict(zip(scored, Ragged(tuple(lengths), (), ()).starts, strict=True))
    images = [ragged.images[r][i] for r, i in goals]
    starts = [first[r] + image.start for (r, _), image in zip(goals, images, strict=True)]
    counts = [image.count for image in images]
    most_kept = max(goals.values())
    start_N, count_N, keep_N = torch.tensor(
        [starts, counts, list(goals.values())], device=hidden_TD.device
    )
    order_NV = rank(result.scores_T, start_N, count_N, max(counts))
    if pruning.method == "gradient":
        kept_NK = order_NV[:, :most_kept]
    else:
        kept_NK = suppress(
            hidden_TD,
            start_N,
            count_N,
            order_NV,
            keep_N,
            most_kept,
            pruning.similarity_threshold,
            pruning.fill_up,
        )
    rows = zip(goals.items(), kept_NK.tolist(), strict=True)
    picks = {place: sorted(row[:keep]) for (place, keep), row in rows}
    orders = {
        place: order[:count]
        for place, order, count in zip(goals, order_NV.unbind(), counts, strict=True)
    }
    return StageChoice(_by_request(ragged, picks), scored, result, orders)


def rank(scores_T: Tensor, start_N: Tensor, count_N: Tensor, most: int) -> Tensor:
    """Local indices of each image by falling score; of equal scores the lower index first.

    Args:
        scores_T: packed scores.
        start_N: packed index of each image's first token.
        count_N: tokens of each.
        most: the largest of `count_N`, V.

    Returns:
        `[N, V]`; past an image's count the indices that it does not have.
    """
    place_V = torch.arange(most, device=scores_T.device)
    valid_NV = place_V < count_N[:, None]
    index_NV = (start_N[:, None] + place_V).where(valid_NV, start_N[:, None])
    scores_NV = scores_T[index_NV].masked_fill(~valid_NV, -torch.inf)
    return scores_NV.sort(dim=1, descending=True, stable=True).indices


def _random(image: Image, keep: int, seed: int, salt: int, layer: int, number: int) -> list[int]:
    generator = torch.Generator().manual_seed(salt_of([seed, salt, layer, number]) >> 1)
    return sorted(torch.randperm(image.count, generator=generator)[:keep].tolist())


def _by_request(ragged: Ragged, picks: dict[tuple[int, int], list[int]]) -> Kept:
    return [
        [picks.get((request, number)) for number in range(len(images))]
        for request, images in enumerate(ragged.images)
    ]
