"""Replay of EADP on the frames of a video, in SigLIP's space, each frame alone.

Shapes: F frames, N visual tokens of one, L tokens of the text, C size of visual features, T tokens
kept of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.eadp import check_importance, check_kept_texts, kept_texts, settings_of
from tests.conformance.files import Case, Tensors
from trio.pruning.coverage import cover, similarity
from trio.pruning.relevance import Grid, Trace, importance, select


def replay(case: Case, recorded: Tensors) -> Checks:
    """Score and choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    checks = Checks()
    features_FNC = recorded["image_features"]
    frames, tokens, _ = features_FNC.shape
    sizes = [case.fact("frames"), case.fact("tokens_per_frame"), case.fact("D")]
    checks.equal("image_features", list(features_FNC.shape), sizes)
    if case.fact("visual_token_num") >= tokens:
        checks.close("pruned_features", features_FNC, recorded["pruned_features"])
        checks.limit = "nothing is chosen, as all tokens stay"
        return checks
    rows, columns = case.fact("grid_given")
    grids = [(rows, columns)] if rows * columns == tokens else None
    checks.equal("smoothed", grids is not None, case.fact("smoothed"))
    checks.equal("grid", math.prod(case.fact("grid")), tokens)
    if case.fact("vision_space"):
        seen_FND = recorded["vision_space_features"]
        final_FN = _check_importance(case, recorded, checks, seen_FND, grids)
    else:
        # Without such features the reference lets every token count the same.
        seen_FND, final_FN = features_FNC, torch.ones(frames, tokens)
        checks.close("importance_smoothed", final_FN, recorded["importance_smoothed"])
    _check_choice(case, recorded, checks, seen_FND, final_FN)
    return checks


def _check_importance(
    case: Case, recorded: Tensors, checks: Checks, seen_FND: Tensor, grids: Sequence[Grid] | None
) -> Tensor:
    texts = recorded["text_embeds_seq"], recorded["text_embeds"]
    checks.equal("text", list(texts[0].shape), [1, case.fact("L"), case.fact("Dv")])
    settings, traces, final = settings_of(case), [], []
    for own_ND in seen_FND:
        trace = Trace()
        final.append(importance(own_ND, *texts, grids, settings, trace=trace))
        traces.append(trace)
    checks.equal("text_tokens_kept", kept_texts(traces[0]), case.fact("text_tokens_kept"))
    matches = [trace.matches[0][0] for trace in traces]
    for name, got in {
        "global_sim": [match.whole_N for match in matches],
        "local_sim": [match.dense_N for match in matches],
        "text_entropy": [match.entropy_L for match in matches],
        "kept_entropy": [match.entropy_L[match.kept_R] for match in matches],
    }.items():
        checks.close(name, torch.stack(got), recorded[name])
    check_kept_texts(torch.stack([match.kept_R for match in matches]), recorded, checks)
    check_importance(traces, final, recorded, checks)
    return torch.stack(final)


def _check_choice(
    case: Case, recorded: Tensors, checks: Checks, seen_FND: Tensor, final_FN: Tensor
) -> None:
    tokens = final_FN.shape[1]
    keep = case.fact("visual_token_num")
    rows = recorded["sim_matrix_rows"]
    checks.close("sim_matrix_rows", similarity(seen_FND)[:, : rows.shape[1]], rows)
    order_FT = select(final_FN, seen_FND, keep)
    checks.equal("select_idx", order_FT, recorded["select_idx"])
    gain_FT = cover(seen_FND, keep, importance_BN=final_FN).gain_BK
    checks.close("selected_gain", gain_FT / tokens, recorded["selected_gain"] / tokens)
    selected_FT = order_FT.sort(dim=1).values
    checks.equal("selected", selected_FT, recorded["selected"])
    kept_FTC = recorded["image_features"].take_along_dim(selected_FT[..., None], dim=1)
    checks.close("pruned_features", kept_FTC, recorded["pruned_features"])
