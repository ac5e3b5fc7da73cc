"""Replay of SCOPE: saliency by the class token, and the choice by saliency and coverage.

Shapes: B images or tiles, N patches of one, T tokens kept of one.
"""

from __future__ import annotations

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.encoders.scope import saliency, scope
from trio.errors import UserError
from trio.pruning.coverage import Combined, similarity

_COMBINED: dict[str, Combined] = {"multi": "product", "add": "sum"}


def replay(case: Case, recorded: Tensors) -> Checks:
    """Choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    checks = Checks()
    hidden_BSD, attention_BHN = recorded["hidden_states"], recorded["cls_attention"]
    images, heads, patches = attention_BHN.shape
    sizes = [case.fact(letter) for letter in ("B", "heads", "N", "D")]
    checks.equal("sizes", [images, heads, patches, hidden_BSD.shape[-1]], sizes)
    # The reference shares a budget out over all that is in the batch.
    keep = int(case.fact("token_num") / images)
    checks.equal("per_image", keep, case.fact("per_image"))
    if case.fact("combined") not in _COMBINED:
        raise UserError(f"case {case.name}: combined is {case.fact('combined')!r}, not known here")
    alpha, combined = case.fact("alpha"), _COMBINED[case.fact("combined")]
    checks.close("cls_attention_sum", saliency(attention_BHN), recorded["cls_attention_sum"])
    checks.close("saliency", saliency(attention_BHN, alpha), recorded["saliency"])
    rows = recorded["similarity_rows"]
    similar_BNN = similarity(hidden_BSD[:, 1:], shifted=False)
    checks.close("similarity_rows", similar_BNN[:, : rows.shape[1]], rows)
    chosen = scope(hidden_BSD, attention_BHN, keep, alpha=alpha, combined=combined)
    checks.equal("select_idx", chosen.order_BK - 1, recorded["select_idx"])
    checks.equal("all_indices", chosen.order_BK, recorded["all_indices"])
    gains = chosen.gain_BK, recorded["selected_gain"]
    checks.close("selected_gain", gains[0] / patches, gains[1] / patches)
    kept_BT1 = chosen.order_BK.sort(dim=1).values[..., None]
    checks.close("tokens", hidden_BSD.take_along_dim(kept_BT1, dim=1), recorded["tokens"])
    return checks
