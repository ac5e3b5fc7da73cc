"""Replay of PruneSID: groups by principal components, suppression in each, and counts.

The reference draws its components at random, so the recorded ones are taken as input; where the
record says that exact ones make the same groups, ours have to.

Shapes: B images, N patches of one, S tokens of the tower, D hidden size, Q groups, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.encoders.prunesid import (
    Selection,
    by_class_token,
    by_component,
    components,
    cosines,
    merged_budget,
)

_SORTED_ABOVE = 150
"""Tokens from which the reference's form for merged features puts them in the image's order."""
_EXACT = 3e-3
"""How near exact components come to the recorded ones, where they make the same groups."""


def replay(case: Case, recorded: Tensors) -> Checks:
    """Choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    own = case.one_of("variant", {"llava": _llava, "qwen": _qwen})
    checks = Checks()
    own(case, recorded, checks)
    return checks


def _llava(case: Case, recorded: Tensors, checks: Checks) -> None:
    hidden_BSD, attention_BHN = recorded["hidden_states"], recorded["cls_attention"]
    keep, drawn_BNQ = case.fact("need_token_num"), recorded["components"]
    sizes = [case.fact(letter) for letter in ("B", "heads", "N", "D")]
    checks.equal("sizes", [*attention_BHN.shape, hidden_BSD.shape[2]], sizes)
    checks.close("threshold_ratio", torch.tensor(keep / 32), _real(case, "threshold_ratio"))
    checks.close("cls_attention_sum", attention_BHN.sum(dim=1), recorded["cls_attention_sum"])
    rows = recorded["similarity_rows"]
    similar = torch.stack([cosines(own[1:])[: rows.shape[1]] for own in hidden_BSD])
    checks.close("similarity_rows", similar, rows)
    found = [
        by_class_token(hidden_SD, attention_HN, keep, components_NQ=drawn_NQ)
        for hidden_SD, attention_HN, drawn_NQ in zip(
            hidden_BSD, attention_BHN, drawn_BNQ, strict=True
        )
    ]
    _check_exact(case, recorded, checks, hidden_BSD[:, 1:])
    _check_groups(case, recorded, checks, found, stacked=True)
    order_BK = torch.stack([own.order_K for own in found])
    checks.equal("tokens_out", order_BK.shape[1], case.fact("tokens_out"))
    checks.equal("all_indices", order_BK, recorded["all_indices"])
    tokens_BKD = hidden_BSD.take_along_dim(order_BK[..., None], dim=1)
    checks.close("tokens", tokens_BKD, recorded["tokens"])


def _qwen(case: Case, recorded: Tensors, checks: Checks) -> None:
    features_ND, drawn_NQ = recorded["image_features"], recorded["components"]
    tokens = len(features_ND)
    checks.equal("sizes", list(features_ND.shape), [case.fact("N"), case.fact("D")])
    keep = merged_budget(tokens, case.fact("need_token_num"))
    checks.equal("need_of_this_image", keep, case.fact("need_of_this_image"))
    factor = torch.tensor(max(18 * keep / tokens, 1.0))
    checks.close("threshold_ratio", factor, _real(case, "threshold_ratio"))
    found = by_component(features_ND, keep, components_NQ=drawn_NQ)
    _check_exact(case, recorded, checks, features_ND[None])
    _check_groups(case, recorded, checks, [found], stacked=False)
    order_K = found.order_K.sort().values if keep > _SORTED_ABOVE else found.order_K
    checks.equal("tokens_out", len(order_K), case.fact("tokens_out"))
    checks.equal("all_indices", order_K, recorded["all_indices"])
    if recorded.get("tokens") is not None:
        checks.close("tokens", features_ND[order_K], recorded["tokens"])


def _real(case: Case, fact: str) -> Tensor:
    return torch.tensor(float(case.fact(fact)))


def _check_exact(case: Case, recorded: Tensors, checks: Checks, patches_BND: Tensor) -> None:
    count = case.fact("components")
    if not case.fact("exact_svd_reproduces"):
        return
    exact_BNQ = torch.stack([components(own_ND, count) for own_ND in patches_BND])
    drawn_BNQ = recorded["components"].view_as(exact_BNQ)
    far = float((exact_BNQ - drawn_BNQ).abs().max())
    checks.equal("exact components within the bar", far <= _EXACT, True)
    groups = exact_BNQ.argmax(dim=2).view_as(recorded["group"])
    checks.equal("group by exact components", groups, recorded["group"])


def _check_groups(
    case: Case, recorded: Tensors, checks: Checks, found: Sequence[Selection], *, stacked: bool
) -> None:
    """stacked: whether the record has a dimension of images."""

    def of_all(part: Callable[[Selection], Tensor | np.ndarray | float]) -> Tensor:
        parts = [torch.as_tensor(part(own)) for own in found]
        return torch.stack(parts) if stacked else parts[0]

    count = recorded["components"].shape[-1]
    checks.equal("components", count, case.fact("components"))
    checks.equal("group", of_all(lambda own: own.group_N), recorded["group"])
    for name, got in {
        "sim_mean": of_all(lambda own: own.mean),
        "threshold": of_all(lambda own: own.threshold),
    }.items():
        checks.close(name, got.float(), recorded[name])
    for name, got in {
        "group_counts": of_all(lambda own: own.counts.sizes_Q),
        "keep_nms_counts": of_all(lambda own: own.counts.survivors_Q),
        "group_upper_bound": of_all(lambda own: own.counts.most_Q),
        "group_token_counts": of_all(lambda own: own.counts.kept_Q),
    }.items():
        checks.equal(name, got, recorded[name])
    suppressed = [int((own.counts.sizes_Q - own.counts.survivors_Q).sum()) for own in found]
    checks.equal("suppressed", suppressed if stacked else suppressed[0], case.fact("suppressed"))
    rounds = recorded["nms_order"].shape[-1]
    survivors = of_all(lambda own: _wide(own.survivors_QR, rounds))
    checks.equal("nms_order", survivors, recorded["nms_order"])


def _wide(table_QR: np.ndarray, rounds: int) -> np.ndarray:
    """The table as wide as the record's, which has the rounds of the whole batch."""
    missing = max(0, rounds - table_QR.shape[1])
    return np.pad(table_QR, ((0, 0), (0, missing)), constant_values=-1)
