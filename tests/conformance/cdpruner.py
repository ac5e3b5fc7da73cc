"""Replay of CDPruner: relevance by a text, rows of the kernel, and the greedy choice.

Shapes: B tiles of an image, I images, N visual tokens of a tile or image, M texts, K tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.pruning.methods.cdpruner import (
    cosines,
    determinantal,
    kernel_rows,
    relevance,
    unit_length,
)


def replay(case: Case, recorded: Tensors) -> Checks:
    """Choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    own = case.one_of("variant", {"llava": _llava, "qwen": _qwen})
    checks = Checks()
    checks.equal("epsilon_numerator", 1e-6, case.fact("epsilon_numerator"))
    own(case, recorded, checks)
    return checks


def _llava(case: Case, recorded: Tensors, checks: Checks) -> None:
    """Relevance is scaled over all tiles, and each keeps the same number."""
    checks.equal("normalised_over", "batch", case.fact("normalised_over"))
    features_BNC, patches_BND = recorded["image_features"], recorded["image_embeds"]
    texts_MD = recorded["text_embeds"]
    sizes = [case.fact(letter) for letter in "BNCMD"]
    checks.equal("sizes", [*features_BNC.shape, *texts_MD.shape], sizes)
    # The record has the cosines as they are; relevance counts them negatively.
    checks.close("relevance_cosine", cosines(patches_BND, texts_MD), recorded["relevance_cosine"])
    relevance_BN = relevance(patches_BND, texts_MD, epsilon=case.fact("epsilon_denominator"))
    checks.close("relevance", relevance_BN, recorded["relevance"])
    order_BK = _check_choice(recorded, checks, relevance_BN, features_BNC, case.fact("T"))
    mask_BN = torch.zeros_like(recorded["index_mask"]).scatter_(1, order_BK, 1)
    checks.equal("index_mask", mask_BN, recorded["index_mask"])


def _qwen(case: Case, recorded: Tensors, checks: Checks) -> None:
    """Relevance is scaled over each image, and compared with one mean of a text's embeddings."""
    checks.equal("normalised_over", "image", case.fact("normalised_over"))
    features_ND, text_D = recorded["image_features"], recorded["text_embeds"]
    checks.equal("D", [features_ND.shape[1], len(text_D)], [case.fact("D")] * 2)
    merged = case.fact("spatial_merge_size") ** 2
    sizes = [int(own.prod()) // merged for own in recorded["grid_thw"]]
    kept = []
    for number, (own_ND, facts) in enumerate(
        zip(features_ND.split(sizes), case.fact("images"), strict=True)
    ):
        keep = min(case.fact("visual_token_num"), len(own_ND))
        got = [len(own_ND), keep, keep < len(own_ND)]
        recorded_facts = [case.of(facts, fact) for fact in ("tokens", "kept", "pruned")]
        checks.equal(f"image_{number}", got, recorded_facts)
        order_K = torch.arange(keep)
        if keep < len(own_ND):
            relevance_1N = relevance(
                own_ND[None], text_D[None], epsilon=case.fact("epsilon_denominator")
            )
            checks.close(f"relevance_{number}", relevance_1N[0], recorded[f"relevance_{number}"])
            (order_K,) = _check_choice(
                recorded, checks, relevance_1N, own_ND[None], keep, f"_{number}"
            )
        kept.append(own_ND[order_K.sort().values])
    checks.equal("pruned_split_sizes", [len(own) for own in kept], recorded["pruned_split_sizes"])
    checks.close("pruned_features", torch.cat(kept), recorded["pruned_features"])


def _check_choice(
    recorded: Tensors,
    checks: Checks,
    relevance_BN: Tensor,
    features_BNC: Tensor,
    keep: int,
    suffix: str = "",
) -> Tensor:
    """suffix: of the names of one image's tensors, which have no dimension of tiles."""

    def expected(name: str) -> Tensor:
        own = recorded[name + suffix]
        return own[None] if suffix else own

    unit_BNC = unit_length(features_BNC)
    rows_BR = torch.arange(expected("kernel_rows").shape[1]).expand(len(relevance_BN), -1)
    rows = kernel_rows(relevance_BN, unit_BNC, rows_BR)
    checks.close("kernel_rows" + suffix, rows, expected("kernel_rows"))
    rows = kernel_rows(torch.ones_like(relevance_BN), unit_BNC, rows_BR)
    checks.close("similarity_rows" + suffix, rows, expected("similarity_rows"))
    chosen = determinantal(relevance_BN, features_BNC, keep)
    checks.equal("select_order" + suffix, chosen.order_BK, expected("select_order"))
    selected_BK = chosen.order_BK.sort(dim=1).values
    checks.equal("selected" + suffix, selected_BK, expected("selected"))
    checks.close("selected_gain" + suffix, chosen.gain_BK, expected("selected_gain"))
    return chosen.order_BK
