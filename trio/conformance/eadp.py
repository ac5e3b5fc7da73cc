"""Replay of EADP: importance of visual tokens by a text, and which of them are chosen.

Shapes: B samples, N visual tokens of each, M texts, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from trio.conformance.checks import Checks
from trio.conformance.files import Case, Tensors
from trio.errors import UserError
from trio.pruning.eadp import Grid, Match, Settings, Trace, importance, select, similarity

_TILE = 24
"""Rows and columns of the reference's tiles."""


def replay(case: Case) -> Checks:
    """Score and choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    recorded = case.tensors()
    settings = _settings(case)
    checks = Checks()
    _check_sizes(case, recorded, checks)
    grids = _grids(case.fact("N"))
    texts = recorded["text_embeds_seq"], recorded["text_embeds"]
    traces, final = [], []
    for patches_NP in recorded["image_embeds"]:
        trace = Trace()
        final.append(importance(patches_NP, *texts, grids, settings, trace=trace))
        traces.append(trace)
    _check_matches([trace.matches[0] for trace in traces], recorded, checks)
    kept = len(traces[0].matches[0][0].kept_R)
    checks.equal("text_tokens_kept", kept, case.fact("text_tokens_kept"))
    checks.equal("smoothed", grids is not None, case.fact("smoothed"))
    for name, got in {
        "text_sim": [trace.text_N for trace in traces],
        "importance_minmax": [trace.minmax_N for trace in traces],
        "importance_smoothed": [trace.smoothed_N for trace in traces],
        "importance_final": final,
    }.items():
        checks.close(name, torch.stack(got), recorded[name])
    _check_choice(case, torch.stack(final), recorded, checks)
    return checks


def _settings(case: Case) -> Settings:
    entropy, local = case.fact("entropy_filter"), case.fact("local_aggregation")
    smoothing, choice = case.fact("spatial_smoothing"), case.fact("selection")
    if case.of(local, "strategy") != "negative_entropy":
        raise UserError(
            f"case {case.name}: text tokens are averaged by negative_entropy here, not by "
            f"{local['strategy']}"
        )
    if case.of(choice, "K") != 1:
        raise UserError(f"case {case.name}: one tile is replayed here, not {choice['K']}")
    return Settings(
        alpha=case.fact("alpha"),
        beta=case.fact("beta"),
        sharpness=case.of(entropy, "T"),
        kept_texts=case.of(entropy, "entropy_keep_ratio"),
        entropy_temperature=case.of(local, "M_temp"),
        entropy_over="image",
        kernel=case.of(smoothing, "kernel_size"),
        sigma=case.of(smoothing, "sigma"),
    )


def _grids(tokens: int) -> list[Grid] | None:
    """The reference takes the grid from the number of tokens."""
    tiles, rest = divmod(tokens, _TILE**2)
    if not rest:
        return [(_TILE, _TILE)] * tiles
    edge = isqrt(tokens)
    return [(edge, edge)] if edge**2 == tokens else None


def _check_sizes(case: Case, recorded: Tensors, checks: Checks) -> None:
    for name, letters in {
        "image_features": "BNC",
        "image_embeds": "BND",
        "text_embeds": "MD",
        "text_embeds_seq": "MLD",
    }.items():
        sizes = [case.fact(letter) for letter in letters]
        checks.equal(name, list(recorded[name].shape), sizes)


def _check_matches(matches: list[list[Match]], recorded: Tensors, checks: Checks) -> None:
    """matches: by sample and text."""

    def stack(part: Callable[[Match], Tensor], dim: int) -> Tensor:
        """Samples in front, texts as the record has them."""
        return torch.stack([torch.stack([part(m) for m in own], dim=dim) for own in matches])

    parts = {
        "global_sim": stack(lambda m: m.whole_N, 1),
        "local_sim_all": stack(lambda m: m.dense_NL, 1),
        "text_entropy": stack(lambda m: m.entropy_L, 0),
        "kept_entropy": stack(lambda m: m.entropy_L[m.kept_R], 0),
        "filtered_local_sim": stack(lambda m: m.dense_NL[:, m.kept_R], 1),
        "local_sim": stack(lambda m: m.dense_N, 1),
    }
    for name, got in parts.items():
        checks.close(name, got, recorded[name])
    checks.equal("kept_text_indices", stack(lambda m: m.kept_R, 0), recorded["kept_text_indices"])


def _check_choice(case: Case, importance_BN: Tensor, recorded: Tensors, checks: Checks) -> None:
    features_BNC = recorded["image_features"]
    similar_BNN = similarity(features_BNC)
    rows = recorded["sim_matrix_rows"]
    checks.close("sim_matrix_rows", similar_BNN[:, : rows.shape[1]], rows)
    whole = recorded.get("sim_matrix")
    if whole is not None:
        checks.close("sim_matrix", similar_BNN, whole)
    chosen_BT = select(importance_BN, features_BNC, case.fact("T"))
    checks.equal("select_idx", chosen_BT, recorded["select_idx"])
    mask_BN = torch.zeros_like(recorded["index_mask"]).scatter_(1, chosen_BT, 1)
    checks.equal("index_mask", mask_BN, recorded["index_mask"])
