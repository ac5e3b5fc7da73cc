"""Replay of EADP: importance of visual tokens by a text, and which of them are chosen.

Shapes: B samples, N visual tokens of each, M texts, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.errors import UserError
from trio.pruning.coverage import similarity
from trio.pruning.relevance import Grid, Match, Settings, Trace, importance, select

_TILE = 24
"""Rows and columns of the reference's tiles."""
_WEIGHTS: dict[str, Literal["text", "patch"]] = {
    "negative_entropy": "text",
    "entropy_tempered": "patch",
}
MATCHES: dict[str, tuple[Callable[[Match], Tensor], int]] = {
    "global_sim": (lambda m: m.whole_N, 1),
    "local_sim_all": (lambda m: m.dense_NL, 1),
    "text_entropy": (lambda m: m.entropy_L, 0),
    "kept_entropy": (lambda m: m.entropy_L[m.kept_R], 0),
    "filtered_local_sim": (lambda m: m.dense_NL[:, m.kept_R], 1),
    "local_sim": (lambda m: m.dense_N, 1),
}
"""Recorded quantities of a text and a tile, and the dimension behind the tiles' that texts have."""


def replay(case: Case, recorded: Tensors) -> Checks:
    """Score and choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    tiles = case.of(case.fact("selection"), "K")
    if tiles != 1:
        raise UserError(f"case {case.name}: one tile is replayed here, not {tiles}")
    settings = settings_of(case, entropy_over="image")
    checks = Checks()
    check_sizes(case, recorded, checks)
    grids = grids_of(case.fact("N"))
    texts = recorded["text_embeds_seq"], recorded["text_embeds"]
    traces, final = [], []
    for patches_NP in recorded["image_embeds"]:
        trace = Trace()
        final.append(importance(patches_NP, *texts, grids, settings, trace=trace))
        traces.append(trace)
    check_matches([trace.matches[0] for trace in traces], recorded, checks, MATCHES)
    checks.equal("text_tokens_kept", kept_texts(traces[0]), case.fact("text_tokens_kept"))
    checks.equal("smoothed", grids is not None, case.fact("smoothed"))
    check_importance(traces, final, recorded, checks)
    _check_choice(case, torch.stack(final), recorded, checks)
    return checks


def settings_of(case: Case, **more: Any) -> Settings:
    """What the case says of EADP's importance.

    Raises:
        UserError: it is averaged in a way that is not there.
    """
    entropy, local = case.fact("entropy_filter"), case.fact("local_aggregation")
    smoothing, strategy = case.fact("spatial_smoothing"), case.of(local, "strategy")
    if strategy not in _WEIGHTS:
        raise UserError(
            f"case {case.name}: text tokens are averaged by {' or '.join(_WEIGHTS)} here, not by "
            f"{strategy}"
        )
    return Settings(
        alpha=case.fact("alpha"),
        beta=case.fact("beta"),
        sharpness=case.of(entropy, "T"),
        kept_texts=case.of(entropy, "entropy_keep_ratio"),
        entropy_temperature=case.of(local, "M_temp"),
        weights=_WEIGHTS[strategy],
        kernel=case.of(smoothing, "kernel_size"),
        sigma=case.of(smoothing, "sigma"),
        **more,
    )


def grids_of(tokens: int) -> list[Grid] | None:
    """The reference takes the grid from the number of tokens."""
    tiles, rest = divmod(tokens, _TILE**2)
    if not rest:
        return [(_TILE, _TILE)] * tiles
    edge = isqrt(tokens)
    return [(edge, edge)] if edge**2 == tokens else None


def check_sizes(case: Case, recorded: Tensors, checks: Checks) -> None:
    """The inputs have the sizes that the case states."""
    for name, letters in {
        "image_features": "BNC",
        "image_embeds": "BND",
        "text_embeds": "MD",
        "text_embeds_seq": "MLD",
    }.items():
        sizes = [case.fact(letter) for letter in letters]
        checks.equal(name, list(recorded[name].shape), sizes)


def check_matches(
    matches: list[list[Match]], recorded: Tensors, checks: Checks, names: Iterable[str]
) -> None:
    """matches: by image or tile, and text."""

    def stack(part: Callable[[Match], Tensor], dim: int) -> Tensor:
        """Images in front, texts as the record has them."""
        return torch.stack([torch.stack([part(m) for m in own], dim=dim) for own in matches])

    for name in names:
        checks.close(name, stack(*MATCHES[name]), recorded[name])
    check_kept_texts(stack(lambda m: m.kept_R, 0), recorded, checks)


def check_kept_texts(kept: Tensor, recorded: Tensors, checks: Checks) -> None:
    """Which text tokens count; some kinds have them by index, others by entropy."""
    expected = recorded["kept_text_indices"].sort(dim=-1).values
    checks.equal("kept_text_indices", kept.sort(dim=-1).values, expected)


def check_importance(
    traces: Sequence[Trace], final: Sequence[Tensor], recorded: Tensors, checks: Checks
) -> None:
    """Of images, each with its tiles back to back where the record has a row for every tile."""
    for name, got in {
        "text_sim": [trace.text_N for trace in traces],
        "importance_minmax": [trace.minmax_N for trace in traces],
        "importance_smoothed": [trace.smoothed_N for trace in traces],
        "importance_final": final,
    }.items():
        checks.close(name, torch.cat(list(got)).view_as(recorded[name]), recorded[name])


def kept_texts(trace: Trace) -> int:
    """Tokens of a text that passed the entropy filter."""
    return len(trace.matches[0][0].kept_R)


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
