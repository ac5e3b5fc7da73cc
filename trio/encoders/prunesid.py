"""PruneSID: groups of patches by principal components, and suppression inside each.

PruneSID (arXiv 2603.09480): every patch belongs to the component of which it has most; inside a
group similar patches are suppressed, and each group keeps as many tokens as its survivors suggest.
Where the authors draw the components from a randomised decomposition on the global random state,
so that a result depends on what ran before, they are exact here. Values are computed in float32 on
the tensors' device, components in float64; suppression and counts on the host.

Shapes: N patches of an image; S tokens of the tower (the class token, then the patches); D hidden
size; H heads; Q components and groups; R most survivors of a group; K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trio.encoders.reduction import Reduced, Reduction, TowerShape, TowerStates, chosen_one_by_one

_TOKENS_PER_COMPONENT = 4
_LEAST_MERGED = 16
"""Tokens that the form for merged features keeps at least, and up to which it keeps all."""

Mean = Literal["pairs", "upper_triangle"]
"""Of cosines: over all pairs of two patches; or the sum over these and each patch with itself,
divided by N squared (about half the mean), as the authors' code for merged features has it."""


class PruneSID(Reduction):
    """The class token and patches. In the image's order: the authors' code lets them leave group by
    group, which shuffles the image that the decoder sees."""

    name = "prunesid"

    def __call__(self, states: TowerStates, keeps: Sequence[int]) -> Reduced:
        return chosen_one_by_one(states, keeps, _tokens)

    def flops(self, shape: TowerShape, keep: int) -> int:
        """One row of attention, products and cosines of all patches with each other, and about
        nine times the cube of their number for the eigenvectors."""
        return shape.row_flops + 2 * shape.patches**2 * shape.hidden_size + 9 * shape.patches**3


def _tokens(hidden_SD: Tensor, attention_N: Tensor, keep: int) -> Tensor:
    return by_class_token(hidden_SD, attention_N[None], keep).order_K


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is kept of an image, and how it came about."""

    order_K: Tensor
    """Indices, group after group; with a class token 0 is that and patch p is p + 1."""
    components_NQ: Tensor
    """Each patch's coordinates, absolute values."""
    group_N: Tensor
    """The component of which each patch has most."""
    mean: float
    """Mean cosine of patches."""
    threshold: float
    """Cosine above which a patch is suppressed."""
    survivors_QR: np.ndarray
    """Patches of each group that are not, by falling score; -1 fills up."""
    counts: Counts
    """Of groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Tokens of each group, `[Q]`."""

    sizes_Q: np.ndarray
    """Patches."""
    survivors_Q: np.ndarray
    """Patches that are not suppressed."""
    most_Q: np.ndarray
    """How many may be kept."""
    kept_Q: np.ndarray
    """How many are."""


@torch.no_grad()
def by_class_token(
    hidden_SD: Tensor, attention_HN: Tensor, keep: int, *, components_NQ: Tensor | None = None
) -> Selection:
    """For a tower with a class token, before its projector.

    Args:
        hidden_SD: hidden states that leave the second-last layer.
        attention_HN: of the class token to the patches there, after the softmax.
        keep: tokens to keep, the class token among them.
        components_NQ: instead of exact ones; the sign does not matter.

    Raises:
        ValueError: the image has fewer tokens than K, or nothing is to be kept.
    """
    return _select(
        hidden_SD[1:],
        keep,
        class_tokens=1,
        score_N=attention_HN.float().sum(dim=0),
        components_NQ=components_NQ,
        least_components=1,
        factor=keep / 32,
        mean="pairs",
    )


@torch.no_grad()
def by_component(
    features_ND: Tensor, keep: int, *, components_NQ: Tensor | None = None
) -> Selection:
    """For merged features of a tower without a class token; a patch scores by its component.

    Args:
        features_ND: an image's visual tokens behind the merger.
        keep: tokens to keep; `merged_budget` is the authors' choice.
        components_NQ: instead of exact ones; the sign does not matter.

    Raises:
        ValueError: the image has fewer tokens than K, or nothing is to be kept.
    """
    return _select(
        features_ND,
        keep,
        class_tokens=0,
        score_N=None,
        components_NQ=components_NQ,
        least_components=4,
        factor=max(18 * keep / len(features_ND), 1.0),
        mean="upper_triangle",
    )


def merged_budget(tokens: int, asked: int) -> int:
    """Tokens to keep of an image of so many, where `asked` would be kept of 576."""
    if tokens <= _LEAST_MERGED:
        return tokens
    return min(tokens, max(round(tokens * asked / 576), _LEAST_MERGED))


def components(patches_ND: Tensor, count: int) -> Tensor:
    """Each patch's coordinates on the principal components, absolute values, float32 `[N, Q]`.

    Of the left singular vectors of the sigmoid, from which each patch's mean over channels is
    subtracted. What the rank does not reach is zero.
    """
    # What is not finite is for the caller to report; it must not end the decomposition of others.
    wide_ND = patches_ND.double().sigmoid().nan_to_num_()
    wide_ND = wide_ND - wide_ND.mean(dim=1, keepdim=True)
    # Exact in float64 for the largest of them, and faster than the singular vectors themselves.
    value_N, vector_NN = torch.linalg.eigh(wide_ND @ wide_ND.T)
    reached_N = value_N > value_N[-1] * 1e-12
    largest_NQ = (vector_NN * reached_N).flip(dims=(1,))[:, :count].abs().float()
    return F.pad(largest_NQ, (0, count - largest_NQ.shape[1]))


def counts(sizes_Q: np.ndarray, survivors_Q: np.ndarray, keep: int, class_tokens: int) -> Counts:
    """How many tokens each group keeps: one, and of the rest by its share of survivors.

    Args:
        sizes_Q: patches of each group.
        survivors_Q: those that are not suppressed, at least one where there is a patch.
        keep: tokens to keep, class tokens among them.
        class_tokens: 0 or 1.
    """
    most_Q = np.minimum(np.minimum(5 * -(-keep // 64), sizes_Q), survivors_Q)
    raised_QX = np.minimum(most_Q[:, None] + np.arange(sizes_Q.max() + 1), sizes_Q[:, None])
    enough = raised_QX.sum(axis=0) >= min(keep, sizes_Q.sum())
    most_Q = raised_QX[:, enough.argmax()]
    kept_Q = np.minimum(1, sizes_Q)
    rest = max(0, keep - class_tokens - int(kept_Q.sum()))
    wanted = rest + int(kept_Q.sum())
    # To the nearest number, halves to the even one.
    until_Q = np.rint(rest * (survivors_Q.cumsum() / survivors_Q.sum())).astype(np.int64)
    kept_Q = np.minimum(kept_Q + np.diff(until_Q, prepend=0), most_Q)
    order_Q = (-survivors_Q).argsort(kind="stable")
    room_Q = (most_Q - kept_Q)[order_Q]
    before_Q = room_Q.cumsum() - room_Q
    kept_Q[order_Q] += np.clip(wanted - kept_Q.sum() - before_Q, 0, room_Q)
    return Counts(sizes_Q=sizes_Q, survivors_Q=survivors_Q, most_Q=most_Q, kept_Q=kept_Q)


def _select(
    patches_ND: Tensor,
    keep: int,
    *,
    class_tokens: int,
    score_N: Tensor | None,
    components_NQ: Tensor | None,
    least_components: int,
    factor: float,
    mean: Mean,
) -> Selection:
    if not 1 <= keep <= len(patches_ND) + class_tokens:
        raise ValueError(f"cannot keep {keep} of {len(patches_ND) + class_tokens} visual tokens")
    if components_NQ is None:
        count = max(least_components, keep // _TOKENS_PER_COMPONENT)
        components_NQ = components(patches_ND, count)
    components_NQ = components_NQ.float().abs()
    most_N, group_N = components_NQ.max(dim=1)
    order_N = (most_N if score_N is None else score_N).sort(descending=True, stable=True).indices
    cosine_NN = cosines(patches_ND)
    average = _mean(cosine_NN, mean)
    near_NN = (cosine_NN > factor * average) & (group_N[:, None] == group_N)
    survives_N = _survivors(near_NN[order_N][:, order_N].cpu().numpy())

    ranked_N, groups_N = order_N.cpu().numpy(), group_N[order_N].cpu().numpy()
    survivors_QR = _by_group(ranked_N[survives_N], groups_N[survives_N], components_NQ.shape[1])
    sizes_Q = np.bincount(groups_N, minlength=len(survivors_QR))
    of_groups = counts(sizes_Q, (survivors_QR >= 0).sum(axis=1), keep, class_tokens)
    # Group after group, in each the survivors first, both by score.
    sorted_N = np.lexsort((~survives_N, groups_N))
    groups_N = groups_N[sorted_N]
    rank_N = np.arange(len(groups_N)) - (sizes_Q.cumsum() - sizes_Q)[groups_N]
    kept_K = ranked_N[sorted_N[rank_N < of_groups.kept_Q[groups_N]]] + class_tokens
    order_K = np.concatenate((np.zeros(class_tokens, dtype=np.int64), kept_K))[:keep]
    return Selection(
        order_K=torch.from_numpy(order_K).to(patches_ND.device),
        components_NQ=components_NQ,
        group_N=group_N,
        mean=average,
        threshold=factor * average,
        survivors_QR=survivors_QR,
        counts=of_groups,
    )


def cosines(patches_ND: Tensor) -> Tensor:
    """Of patches with each other, float32 `[N, N]`."""
    with torch.autocast(patches_ND.device.type, enabled=False):
        unit_ND = F.normalize(patches_ND.float(), dim=-1)
        return unit_ND @ unit_ND.T


def _mean(cosine_NN: Tensor, mean: Mean) -> float:
    tokens, own = len(cosine_NN), float(cosine_NN.trace())
    total = float(cosine_NN.sum(dtype=torch.float64))
    if mean == "pairs":
        return (total - own) / max(1, tokens * (tokens - 1))
    return (total + own) / (2 * tokens**2)


def _survivors(near_NN: np.ndarray) -> np.ndarray:
    """Which patches stay when each that does suppresses those behind it that are near it."""
    survives_N = np.ones(len(near_NN), dtype=bool)
    for patch, near_N in enumerate(near_NN):
        if survives_N[patch]:
            survives_N[patch + 1 :] &= ~near_N[patch + 1 :]
    return survives_N


def _by_group(patches_N: np.ndarray, groups_N: np.ndarray, groups: int) -> np.ndarray:
    """`[groups, most]`, the patches of each group in the order given; -1 fills up."""
    sizes_Q = np.bincount(groups_N, minlength=groups)
    table_QR = np.full((groups, sizes_Q.max()), -1)
    there_QR = np.arange(table_QR.shape[1]) < sizes_Q[:, None]
    table_QR[there_QR] = patches_N[groups_N.argsort(kind="stable")]
    return table_QR
