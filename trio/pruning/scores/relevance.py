"""EADP: importance of visual tokens for a prompt, and budgets by tile.

EADP (arXiv 2607.02484), method section; where the paper is silent, as its public code does. A
token matters by how it compares with a text, in one of three spaces: the encoder's joint space of
images and texts (the default settings), the language model's own (`LANGUAGE`), or, for frames of a
video, SigLIP's (`FRAMES`). The cosines count *negatively*, as in that code: what is unlike the text
matters more. Tokens are then chosen one by one, each time the one that adds most to how well the
chosen ones resemble all others, weighted by what these matter (`trio.pruning.selection.coverage`).

Everything is computed in float32 and on the tensors' device.

Shapes: N visual tokens of one image, its tiles back to back; P size of the joint space; M texts, or
chunks of one; L tokens of the longest; R tokens of a text that pass the entropy filter; C size of
visual features; D hidden size of the decoder; B images or tiles of equal N; K tokens kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trio.pruning.selection.coverage import cover

Grid = tuple[int, int]
"""Rows and columns of a tile's tokens. One that is no wider than half the smoothing kernel, as a
single row, is not smoothed."""

Share = Callable[[Tensor, Sequence[int], int], list[int]]
"""Shares a budget out over tiles: importance, tiles' sizes, tokens to keep of all."""

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How importance is made of cosines. The defaults are the published ones."""

    alpha: float = 0.5
    """Share of the text as a whole; the rest is that of its single tokens."""
    beta: float = 1.0
    """Exponent of importance."""
    sharpness: float = 100.0
    """Inverse temperature of a text token's softmax over patches."""
    kept_texts: float = 0.2
    """Share of a text's tokens that count: those of lowest entropy, rounded down, at least one."""
    entropy_temperature: float = 0.01
    """In nats; of the softmax over a text's kept tokens, which weights them by entropy."""
    weights: Literal["text", "patch"] = "text"
    """`text`: a kept token counts the same for all patches, the more the lower its entropy;
    `patch`: for each patch the more, the less alike the two are, in units of the entropy."""
    entropy_over: Literal["tile", "image"] = "tile"
    """The patches that one softmax goes over. The published any-res runs take each tile alone."""
    scaled_over: Literal["tile", "image"] = "image"
    """The patches whose smallest and largest value become 0 and 1. The public code takes each tile
    alone where the images of a batch differ in their number of tiles."""
    smoothed: Literal["tiles", "single"] = "tiles"
    """`tiles`: each tile or frame by itself; `single`: only what has one, as the public code for
    the language model's space does with videos."""
    kernel: int = 3
    """Edge of the Gaussian that smooths importance, in tokens; odd."""
    sigma: float = 1.0
    """Its standard deviation, in tokens."""


PUBLISHED = Settings()
LANGUAGE = Settings(beta=2.0, entropy_over="image")
"""The language model's space, with the exponent of the authors' scripts."""
FRAMES = Settings(beta=2.0, kept_texts=0.5, weights="patch")
"""SigLIP's space, frame by frame, with the exponent of the authors' scripts."""


@dataclass(frozen=True, slots=True)
class Match:
    """One text against the patches of one tile, here N, or of all."""

    whole_N: Tensor
    """Negated cosines with the text as a whole."""
    dense_NL: Tensor
    """With each of its tokens."""
    entropy_L: Tensor
    """Of each token's softmax over the patches, in nats."""
    kept_R: Tensor
    """The tokens that count, by rising entropy."""
    dense_N: Tensor
    """`dense_NL` of these, averaged."""
    both_N: Tensor
    """`whole_N` and `dense_N` fused."""


@dataclass(slots=True)
class Trace:
    """What `importance` went through, filled in if asked for."""

    matches: list[list[Match]] = field(init=False)
    """By tile, or of all tiles at once, the texts'."""
    text_N: Tensor = field(init=False)
    """Their mean over the texts."""
    minmax_N: Tensor = field(init=False)
    """The same, between 0 and 1 over the image."""
    smoothed_N: Tensor = field(init=False)
    """The same, smoothed within each tile."""


@torch.no_grad()
def importance(
    patches_NP: Tensor,
    tokens_MLP: Tensor,
    pooled_MP: Tensor,
    grids: Sequence[Grid] | None,
    settings: Settings = PUBLISHED,
    *,
    mask_ML: Tensor | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """What each visual token of an image matters for a prompt.

    Args:
        patches_NP: visual tokens in the joint space, any floating dtype.
        tokens_MLP: the prompt's text tokens there.
        pooled_MP: its texts as a whole.
        grids: of the image's tiles, in order; None: no grid, so one tile and no smoothing.
        settings: see there.
        mask_ML: true where a text token counts; None counts all L, as the public code does, which
            has padding among them. On a CPU it saves a GPU the wait for how many there are.
        trace: is filled in.

    Returns:
        float32 `[N]`, between 0 and 1.
    """
    trace = Trace() if trace is None else trace
    # In half precision, as under a caller's autocast, importances would collide.
    with torch.autocast(patches_NP.device.type, enabled=False):
        patches_NP = F.normalize(patches_NP.float(), dim=-1)
        tokens_MLP = F.normalize(tokens_MLP.float(), dim=-1)
        pooled_MP = F.normalize(pooled_MP.float(), dim=-1)
        texts = [
            own_LP if mask_ML is None else own_LP[mask_ML[number]]
            for number, own_LP in enumerate(tokens_MLP)
        ]
        sizes = _sizes(len(patches_NP), grids)
        whole = settings.entropy_over == "image"
        trace.matches = [
            [_match(tile_NP, *text, settings) for text in zip(texts, pooled_MP, strict=True)]
            for tile_NP in ([patches_NP] if whole else patches_NP.split(sizes))
        ]
        trace.text_N = torch.cat(
            [torch.stack([match.both_N for match in own]).mean(dim=0) for own in trace.matches]
        )
        whole = settings.scaled_over == "image"
        trace.minmax_N = torch.cat(
            [_scaled(tile) for tile in ([trace.text_N] if whole else trace.text_N.split(sizes))]
        )
        trace.smoothed_N = trace.minmax_N
        if grids is not None and (settings.smoothed == "tiles" or len(grids) == 1):
            trace.smoothed_N = _smoothed(trace.minmax_N, grids, settings)
        return trace.smoothed_N**settings.beta


def instruction(embeds_LD: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens_MLP` and `pooled_MP` of a text in the language model's space.

    The pooled one is the mean of the rows as they are, so that a longer one counts more in it.

    Args:
        embeds_LD: input embeddings of the instruction's tokens, at least one.

    Raises:
        ValueError: there is none.
    """
    if len(embeds_LD) == 0:
        raise ValueError("an instruction without tokens has no mean")
    wide_LD = embeds_LD.float()
    return wide_LD[None], wide_LD.mean(dim=0, keepdim=True)


def _sizes(tokens: int, grids: Sequence[Grid] | None) -> list[int]:
    return [tokens] if grids is None else [math.prod(grid) for grid in grids]


def _scaled(values_N: Tensor) -> Tensor:
    lowest, highest = values_N.aminmax()
    return (values_N - lowest + _EPSILON) / (highest - lowest + _EPSILON)


def _match(patches_NP: Tensor, tokens_LP: Tensor, pooled_P: Tensor, settings: Settings) -> Match:
    """All three of unit length."""
    whole_N = -(patches_NP @ pooled_P)
    dense_NL = -(patches_NP @ tokens_LP.T)
    share_NL = (settings.sharpness * dense_NL).softmax(dim=0)
    entropy_L = -(share_NL * (share_NL + 1e-12).log()).sum(dim=0)
    count = max(1, int(len(tokens_LP) * settings.kept_texts))
    entropy, order_L = entropy_L.sort(stable=True)
    kept_R = order_L[:count]
    dense_N = _averaged(dense_NL[:, kept_R], entropy[:count], settings)
    both_N = settings.alpha * whole_N + (1 - settings.alpha) * dense_N
    return Match(whole_N, dense_NL, entropy_L, kept_R, dense_N, both_N)


def _averaged(dense_NR: Tensor, entropy_R: Tensor, settings: Settings) -> Tensor:
    """The kept tokens' cosines as one value a patch."""
    temperature = settings.entropy_temperature
    if settings.weights == "patch":
        weight_NR = (dense_NR / (temperature * (entropy_R + _EPSILON))).softmax(dim=1)
        return (dense_NR * weight_NR).sum(dim=1)
    return dense_NR @ (-entropy_R / (temperature + _EPSILON)).softmax(dim=0)


def _smoothed(values_N: Tensor, grids: Sequence[Grid], settings: Settings) -> Tensor:
    margin = settings.kernel // 2
    place = torch.arange(-margin, margin + 1, device=values_N.device)
    bell = torch.exp(-(place**2) / (2 * settings.sigma**2))
    weights = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    tiles = []
    for grid, tile_N in zip(grids, values_N.split(_sizes(0, grids)), strict=True):
        if min(grid) <= margin:  # nothing to reflect
            tiles.append(tile_N)
            continue
        padded = F.pad(tile_N.view(1, 1, *grid), [margin] * 4, mode="reflect")
        tiles.append(F.conv2d(padded, weights).flatten())
    return torch.cat(tiles)


def select(importance_BN: Tensor, features_BNC: Tensor, keep: int) -> Tensor:
    """Choose the tokens that together resemble what matters best, by `coverage.cover`.

    Args:
        importance_BN: not negative; without the first dimension for a single image, like the next.
        features_BNC: visual features as the decoder gets them, any floating dtype.
        keep: tokens to take of each image, K.

    Returns:
        `[B, K]` or `[K]`, indices in order of choice.

    Raises:
        ValueError: an image has fewer tokens than K.
    """
    if importance_BN.ndim == 1:
        return select(importance_BN[None], features_BNC[None], keep)[0]
    return cover(features_BNC, keep, importance_BN=importance_BN).order_BK


def share_out(importance_N: Tensor, sizes: Sequence[int], keep: int) -> list[int]:
    """Tokens to keep of each tile of an image: in proportion to the sum of their importance.

    Rounded by largest remainder; of equal ones the first tile gets more. What a tile has no tokens
    for goes to the others, in the same proportion.

    Args:
        importance_N: not negative.
        sizes: tokens of each tile.
        keep: tokens to keep of all.

    Returns:
        Numbers that add up to `keep`, none above its tile's size.

    Raises:
        ValueError: the tiles have fewer tokens than are to be kept.
    """
    if not 0 <= keep <= sum(sizes):
        raise ValueError(f"cannot keep {keep} of {sum(sizes)} visual tokens")
    sums = torch.stack([tile.double().sum() for tile in importance_N.split(list(sizes))]).tolist()
    # Tiles of no importance at all share evenly what no other has room for.
    weights = [max(own, sys.float_info.min) if math.isfinite(own) else 1.0 for own in sums]
    shares = [float(size) for size in sizes]
    left, rest = keep, list(range(len(sizes)))
    while rest:
        whole = math.fsum(weights[tile] for tile in rest)
        asked = {tile: left * (weights[tile] / whole) for tile in rest}
        full = {tile for tile, share in asked.items() if share >= sizes[tile]}
        if not full:
            for tile, share in asked.items():
                shares[tile] = share
            break
        left -= sum(sizes[tile] for tile in full)
        rest = [tile for tile in rest if tile not in full]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda tile: counts[tile] - shares[tile])
    for tile in by_remainder[: keep - sum(counts)]:
        counts[tile] += 1
    return counts


def share_down(importance_N: Tensor, sizes: Sequence[int], keep: int) -> list[int]:
    """As `share_out`, but as the public code: rounded down, at least 1 and at most a tile's size.

    What rounding loses is not handed out, so the numbers add up to less, or, with tiles of hardly
    any importance, to more.
    """
    shares = tile_shares(importance_N, sizes, keep).tolist()
    return [min(size, max(1, int(share))) for size, share in zip(sizes, shares, strict=True)]


def tile_shares(importance_N: Tensor, sizes: Sequence[int], keep: int) -> Tensor:
    """Tokens of each tile before `share_down` rounds them, `[tiles]`."""
    sums = torch.stack([tile_N.sum() for tile_N in importance_N.split(list(sizes))])
    sums = sums.where(sums.isfinite(), 1)
    return keep * sums / (sums.sum() + _EPSILON)


def select_by_tile(
    importance_N: Tensor,
    features_NC: Tensor,
    sizes: Sequence[int],
    keep: int,
    share: Share = share_out,
) -> Tensor:
    """`select` within each tile, of as many tokens as `share` gives it.

    Args:
        importance_N: as for `select`; tokens of tiles back to back.
        features_NC: the same.
        sizes: tokens of each tile.
        keep: tokens to keep of the image, K.
        share: `share_out` or `share_down`.

    Returns:
        `[K]`, of `share_down` another number; indices among all N: tile after tile, within each in
        order of choice.

    Raises:
        ValueError: the image has fewer tokens than K.
    """
    counts = share(importance_N, sizes, keep)
    tiles = zip(importance_N.split(list(sizes)), features_NC.split(list(sizes)), strict=True)
    starts = accumulate(sizes, initial=0)
    return torch.cat(
        [
            select(own_N, own_NC, count) + start
            for (own_N, own_NC), count, start in zip(tiles, counts, starts, strict=False)
        ]
    )
