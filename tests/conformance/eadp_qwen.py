"""Replay of EADP in the language model's space: importance of merged tokens, and their choice.

Shapes: I images of a prompt, N visual tokens of one, L tokens of the instruction, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.eadp import kept_texts, settings_of
from tests.conformance.files import Case, Tensors
from trio.pruning.coverage import cover, similarity
from trio.pruning.relevance import Grid, Settings, Trace, importance, instruction, select


def replay(case: Case, recorded: Tensors) -> Checks:
    """Score and choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    checks = Checks()
    embeds_LD = recorded["embed_tokens"][recorded["instruction_ids"].long()]
    checks.equal("instruction", list(embeds_LD.shape), [case.fact("L"), case.fact("D")])
    texts = instruction(embeds_LD)
    checks.close("text_global", texts[1][0], recorded["text_global"])
    settings = settings_of(case, entropy_over="image", smoothed="single")
    frames = _frames(recorded["grid_thw"], case.fact("spatial_merge_size"))
    sizes = [sum(rows * columns for rows, columns in grids) for grids in frames]
    facts = case.fact("images")
    checks.equal("images", sizes, [case.of(own, "tokens") for own in facts])
    kept = []
    for number, (own_ND, grids) in enumerate(
        zip(recorded["image_features"].split(sizes), frames, strict=True)
    ):
        image = _Image(case, recorded, checks, number)
        kept.append(own_ND[image.check(own_ND, grids, texts, settings)])
    checks.equal("pruned_split_sizes", [len(own) for own in kept], recorded["pruned_split_sizes"])
    checks.close("pruned_features", torch.cat(kept), recorded["pruned_features"])
    return checks


def _frames(grid_thw: Tensor, merge: int) -> list[list[Grid]]:
    """The merged grids of each image's frames."""
    return [[(rows // merge, columns // merge)] * t for t, rows, columns in grid_thw.tolist()]


class _Image:
    """One image of a case against its record."""

    def __init__(self, case: Case, recorded: Tensors, checks: Checks, number: int) -> None:
        self.case = case
        self.recorded = recorded
        self.checks = checks
        self.suffix = f"_{number}"
        self.facts = case.fact("images")[number]

    def check(
        self,
        features_ND: Tensor,
        grids: list[Grid],
        texts: tuple[Tensor, Tensor],
        settings: Settings,
    ) -> Tensor:
        """Compare, and return the kept indices, rising."""
        tokens, keep = len(features_ND), self.case.fact("visual_token_num")
        self._expect("grid", [len(grids), *grids[0]])
        self._expect("kept", min(tokens, keep))
        self._expect("pruned", tokens > keep)
        if tokens <= keep:
            return torch.arange(tokens)
        trace = Trace()
        final_N = importance(features_ND, *texts, grids, settings, trace=trace)
        self._expect("text_tokens_kept", kept_texts(trace))
        self._expect("smoothed", trace.smoothed_N is not trace.minmax_N)
        self._check_importance(trace, final_N)
        return self._check_choice(final_N, features_ND, keep)

    def _expect(self, fact: str, got: object) -> None:
        self.checks.equal(f"{fact}{self.suffix}", got, self.case.of(self.facts, fact))

    def _close(self, name: str, got: Tensor, scale: float = 1.0) -> None:
        expected = self.recorded[name + self.suffix]
        self.checks.close(name + self.suffix, got / scale, expected / scale)

    def _check_importance(self, trace: Trace, final_N: Tensor) -> None:
        ((match,),) = trace.matches
        for name, got in {
            "global_sim": match.whole_N,
            "local_sim_all": match.dense_NL,
            "text_entropy": match.entropy_L,
            "kept_entropy": match.entropy_L[match.kept_R],
            "local_sim": match.dense_N,
            "text_sim": trace.text_N,
            "importance_minmax": trace.minmax_N,
            "importance_smoothed": trace.smoothed_N,
            "importance_final": final_N,
        }.items():
            self._close(name, got)

    def _check_choice(self, final_N: Tensor, features_ND: Tensor, keep: int) -> Tensor:
        rows = len(self.recorded["sim_matrix_rows" + self.suffix])
        self._close("sim_matrix_rows", similarity(features_ND)[:rows])
        order_K = select(final_N, features_ND, keep)
        self.checks.equal(
            "select_idx" + self.suffix, order_K, self.recorded["select_idx" + self.suffix]
        )
        selected_K = order_K.sort().values
        self.checks.equal(
            "selected" + self.suffix, selected_K, self.recorded["selected" + self.suffix]
        )
        chosen = cover(features_ND[None], keep, importance_BN=final_N[None])
        self._close("selected_gain", chosen.gain_BK[0], len(features_ND))
        return selected_K
