"""EADP: the visual tokens that cover what matters of an image, before the decoder sees any.

EADP (arXiv 2607.02484), method section; where the paper is silent, as its public code does. A
token matters by how it compares with a text in the encoder's joint space of images and texts. The
cosines count *negatively*, as in that code: what is unlike the text matters more. Tokens are then
chosen one by one, each time the one that adds most to how well the chosen ones resemble all
others, weighted by what these matter (greedy facility location).

Everything is computed in float32 and on the tensors' device.

Shapes: N visual tokens of one image, its tiles back to back; P size of the joint space; M texts, or
chunks of one; L tokens of the longest; R tokens of a text that pass the entropy filter; C size of
visual features; B images or tiles of equal N; K tokens kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of a tile's tokens, both at least 2."""

_EPSILON = 1e-6
# Candidates looked at first in each round on a CPU. Fewer: more of the others have to be looked at
# in the second step, more: more of these in vain.
_FIRST = 16


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
    entropy_over: Literal["tile", "image"] = "tile"
    """The patches that one softmax goes over. The published any-res runs take each tile alone."""
    kernel: int = 3
    """Edge of the Gaussian that smooths importance, in tokens; odd."""
    sigma: float = 1.0
    """Its standard deviation, in tokens."""


PUBLISHED = Settings()


@dataclass(frozen=True, slots=True)
class Match:
    """One text against the patches of one tile, here N, or of all.

    whole_N: negated cosines with the text as a whole.
    dense_NL: with each of its tokens.
    entropy_L: of each token's softmax over the patches, in nats.
    kept_R: the tokens that count, by rising entropy.
    dense_N: `dense_NL` of these, averaged.
    both_N: `whole_N` and `dense_N` fused.
    """

    whole_N: Tensor
    dense_NL: Tensor
    entropy_L: Tensor
    kept_R: Tensor
    dense_N: Tensor
    both_N: Tensor


@dataclass(slots=True)
class Trace:
    """What `importance` went through, filled in if asked for.

    matches: by tile, or of all tiles at once, the texts'.
    text_N: their mean over the texts.
    minmax_N: the same, between 0 and 1 over the image.
    smoothed_N: the same, smoothed within each tile.
    """

    matches: list[list[Match]] = field(init=False)
    text_N: Tensor = field(init=False)
    minmax_N: Tensor = field(init=False)
    smoothed_N: Tensor = field(init=False)


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
        trace.matches = [
            [_match(tile_NP, *text, settings) for text in zip(texts, pooled_MP, strict=True)]
            for tile_NP in _tiles(patches_NP, grids, settings)
        ]
        trace.text_N = torch.cat(
            [torch.stack([match.both_N for match in own]).mean(dim=0) for own in trace.matches]
        )
        lowest, highest = trace.text_N.aminmax()
        trace.minmax_N = (trace.text_N - lowest + _EPSILON) / (highest - lowest + _EPSILON)
        trace.smoothed_N = trace.minmax_N
        if grids is not None:
            trace.smoothed_N = _smoothed(trace.minmax_N, grids, settings)
        return trace.smoothed_N**settings.beta


def _tiles(
    patches_NP: Tensor, grids: Sequence[Grid] | None, settings: Settings
) -> Sequence[Tensor]:
    if grids is None or settings.entropy_over == "image":
        return [patches_NP]
    return patches_NP.split([rows * columns for rows, columns in grids])


def _match(patches_NP: Tensor, tokens_LP: Tensor, pooled_P: Tensor, settings: Settings) -> Match:
    """All three of unit length."""
    whole_N = -(patches_NP @ pooled_P)
    dense_NL = -(patches_NP @ tokens_LP.T)
    share_NL = (settings.sharpness * dense_NL).softmax(dim=0)
    entropy_L = -(share_NL * (share_NL + 1e-12).log()).sum(dim=0)
    count = max(1, int(len(tokens_LP) * settings.kept_texts))
    entropy, order_L = entropy_L.sort(stable=True)
    kept_R = order_L[:count]
    weight_R = (-entropy[:count] / (settings.entropy_temperature + _EPSILON)).softmax(dim=0)
    dense_N = dense_NL[:, kept_R] @ weight_R
    both_N = settings.alpha * whole_N + (1 - settings.alpha) * dense_N
    return Match(whole_N, dense_NL, entropy_L, kept_R, dense_N, both_N)


def _smoothed(values_N: Tensor, grids: Sequence[Grid], settings: Settings) -> Tensor:
    margin = settings.kernel // 2
    place = torch.arange(-margin, margin + 1, device=values_N.device)
    bell = torch.exp(-(place**2) / (2 * settings.sigma**2))
    weights = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    tiles = []
    for grid, tile_N in zip(grids, values_N.split([math.prod(g) for g in grids]), strict=True):
        padded = F.pad(tile_N.view(1, 1, *grid), [margin] * 4, mode="reflect")
        tiles.append(F.conv2d(padded, weights).flatten())
    return torch.cat(tiles)


@torch.no_grad()
def select(importance_BN: Tensor, features_BNC: Tensor, keep: int) -> Tensor:
    """Choose the tokens that together resemble what matters best.

    In each round the token i with the largest `sum_j importance_j max(0, s_ij - best_j)` is taken,
    `s` being `similarity` and `best_j` the largest of it between j and what is taken so far. Of
    equal ones the first is taken.

    Args:
        importance_BN: not negative; without the first dimension for a single image, like the next.
        features_BNC: visual features as the decoder gets them, any floating dtype.
        keep: tokens to take of each image, K.

    Returns:
        `[B, K]` or `[K]`, indices in order of choice.

    Raises:
        ValueError: an image has fewer tokens than K.
    """
    if not 0 <= keep <= importance_BN.shape[-1]:
        raise ValueError(f"cannot keep {keep} of {importance_BN.shape[-1]} visual tokens")
    if importance_BN.ndim == 1:
        return select(importance_BN[None], features_BNC[None], keep)[0]
    if importance_BN.device.type != "cpu":
        return _all_at_once(importance_BN.float(), similarity(features_BNC), keep)
    # One similarity matrix at a time stays in the CPU's cache.
    chosen = [
        torch.from_numpy(_lazily(own.float().numpy(), similarity(features).numpy(), keep))
        for own, features in zip(importance_BN, features_BNC, strict=True)
    ]
    return torch.stack(chosen)


def similarity(features_BNC: Tensor) -> Tensor:
    """Cosines of tokens with each other, moved from -1 … 1 to 0 … 1; float32 `[B, N, N]`.

    A single image may come without the first dimension.
    """
    with torch.autocast(features_BNC.device.type, enabled=False):
        unit_BNC = F.normalize(features_BNC.float(), dim=-1)
        cosine_BNN = unit_BNC @ unit_BNC.transpose(-1, -2)
    return cosine_BNN.clamp_(-1, 1).add_(1).mul_(0.5)


def _all_at_once(importance_BN: Tensor, similar_BNN: Tensor, keep: int) -> Tensor:
    """Every gain anew in each round, and nothing read back from the device."""
    best_BN = torch.zeros_like(importance_BN)
    taken_BN = torch.zeros_like(importance_BN, dtype=torch.bool)
    chosen_BK = importance_BN.new_zeros((len(importance_BN), keep), dtype=torch.long)
    for place in range(keep):
        more_BNN = (similar_BNN - best_BN[:, None]).clamp_(min=0)
        gain_BN = more_BNN.mul_(importance_BN[:, None]).sum(dim=-1).masked_fill_(taken_BN, -1)
        choice_B1 = gain_BN.argmax(dim=-1, keepdim=True)
        chosen_BK[:, place : place + 1] = choice_B1
        taken_BN.scatter_(1, choice_B1, True)
        row_B1N = similar_BNN.take_along_dim(choice_B1[..., None], dim=1)
        best_BN = torch.maximum(best_BN, row_B1N[:, 0])
    return chosen_BK


def _lazily(importance_N: np.ndarray, similar_NN: np.ndarray, keep: int) -> np.ndarray:
    """The same for one image with few gains computed anew; indices `[K]`.

    A token's gain never grows, so what it was in an earlier round bounds it. Rounding keeps that
    order, as every gain is the same sum over all N: the choice is exactly that of all gains.
    """
    tokens = len(importance_N)
    best_N = np.zeros_like(importance_N)
    bound_N = np.full_like(importance_N, np.inf)
    chosen_K = np.empty(keep, dtype=np.int64)

    def look_again(candidates: np.ndarray) -> None:
        more = similar_NN.take(candidates, axis=0)
        more -= best_N
        np.maximum(more, 0, out=more)
        more *= importance_N
        bound_N[candidates] = np.nan_to_num(more.sum(axis=1))  # so that none is taken twice

    for place in range(keep):
        first = min(_FIRST, tokens - place)
        likely = np.argpartition(bound_N, -first)[-first:]
        look_again(likely)
        look_again(np.flatnonzero(bound_N >= bound_N[likely].max()))
        choice = bound_N.argmax()
        chosen_K[place] = choice
        bound_N[choice] = -1
        np.maximum(best_N, similar_NN[choice], out=best_N)
    return chosen_K


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


def select_by_tile(
    importance_N: Tensor, features_NC: Tensor, sizes: Sequence[int], keep: int
) -> Tensor:
    """`select` within each tile, of as many tokens as `share_out` gives it.

    Args:
        importance_N: as for `select`; tokens of tiles back to back.
        features_NC: the same.
        sizes: tokens of each tile.
        keep: tokens to keep of the image, K.

    Returns:
        `[K]`, indices among all N: tile after tile, within each in order of choice.

    Raises:
        ValueError: the image has fewer tokens than K.
    """
    counts = share_out(importance_N, sizes, keep)
    tiles = zip(importance_N.split(list(sizes)), features_NC.split(list(sizes)), strict=True)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return torch.cat(
        [
            select(own_N, own_NC, count) + start
            for (own_N, own_NC), count, start in zip(tiles, counts, starts, strict=True)
        ]
    )
