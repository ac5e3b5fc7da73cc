"""Replay of TRIO on a Qwen2.5-VL decoder: prefill with pruning, on positions of three axes.

With a cache the reference's layers attend without a causal mask once it has pruned. That is a
fault, and ours do not: of such a case the values are compared up to and including the first
selection, and behind it only what does not depend on values.

Shapes: A axes of positions, S tokens, D hidden size, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from tests.conformance.replay import Replay, StageReplay, load_decoder
from trio.decoder.decoder import Decoder
from trio.errors import UserError
from trio.prefill import PackedPrompts
from trio.pruning.options import Pruning
from trio.pruning.saliency import Saliency, proxy_index
from trio.pruning.schedule import Schedule, Stage

REFERENCE: dict[str, Any] = {
    "proxy_positions": "reference",
    "proxy_layer": "previous",
    "proxy_head": "input_embedding",
    "position_ids": "keep",
    "similarity_threshold": 0.8,
    "fill_up": "reference",
}
"""How the reference prunes; the record does not say so."""


def replay(case: Case, recorded: Tensors) -> Checks:
    """Run a recorded case on its own weights and compare every quantity that can be.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    decoder = _decoder(case)
    how = Pruning(schedule=_schedule(case), **REFERENCE)
    run = Replay(case, recorded, decoder, _prompts(case, recorded), how)
    run.checks.equal("seq_len", sum(run.prompts.lengths), case.fact("seq_len"))
    patches = case.fact("grid_h") * case.fact("grid_w")
    run.checks.equal("grid", patches, case.fact("n_image_tokens"))
    run.check_text()
    stages = _stages(run)
    reach = _reach(run, stages)
    for stage in stages:
        _check_stage(stage, comparable=stage.stage.layer <= reach)
    if case.fact("use_cache"):
        run.check_cache_lengths()
        run.checks.equal("kv_lens", case.fact("kv_lens"), recorded["kv_lens"])
    if reach >= decoder.num_layers:
        run.check_result()
    else:
        run.checks.limit = (
            f"compared up to the selection after layer {reach}: behind it the reference attends "
            "without a causal mask (a fault of its cache), so there only lengths and counts are"
        )
    return run.checks


class _Model(nn.Module):
    """Decoder and head under the names that their weights have in a checkpoint."""

    def __init__(self, config: Qwen2_5_VLTextConfig, *, tied: bool) -> None:
        super().__init__()
        self.model = Qwen2_5_VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def _decoder(case: Case) -> Decoder:
    """The case's model, from its recorded configuration and weights."""
    settings, weights = case.model()
    rope = {
        "rope_type": "default",
        "rope_theta": case.of(settings, "rope_theta"),
        "mrope_section": case.of(settings, "mrope_section"),
    }
    options = {name: value for name, value in settings.items() if name not in rope}
    # Its defaults for these lie outside of a small vocabulary.
    options = {"bos_token_id": None, "eos_token_id": None, **options}
    config = Qwen2_5_VLTextConfig(rope_parameters=rope, **options)
    tied = bool(options.get("tie_word_embeddings")) and weights.get("lm_head.weight") is None
    return load_decoder(_Model(config, tied=tied), weights)


def _schedule(case: Case) -> Schedule:
    """Ratios count from what is left; one that would leave nothing removes nothing."""
    layers, ratios = case.fact("layer_list"), case.fact("image_token_ratio_list")
    if len(layers) != len(ratios):
        raise UserError(
            f"case {case.name}: image_token_ratio_list {ratios} must be as long as layer_list "
            f"{layers}"
        )
    stages, left = [], case.fact("n_image_tokens")
    for layer, ratio in zip(layers, ratios, strict=True):
        left = min(left, int(ratio * left) or left)
        stages.append(Stage(layer, left))
    return Schedule(tuple(stages))


def _prompts(case: Case, recorded: Tensors) -> PackedPrompts:
    embeds, positions = recorded["inputs_embeds"], recorded["position_ids"]
    length = embeds.shape[1]
    if embeds.shape[0] != 1 or positions.shape != (3, 1, length):
        raise UserError(
            f"{recorded.path}: one sample of {length} tokens has inputs_embeds [1, {length}, D] "
            f"and position_ids [3, 1, {length}], got {list(embeds.shape)} and "
            f"{list(positions.shape)}"
        )
    start = case.fact("image_start_index")
    stop = start + case.fact("n_image_tokens")
    if not 0 <= start < stop <= length:
        raise UserError(f"case {case.name}: no image at {start}..{stop} among {length} tokens")
    return PackedPrompts(
        embeds_TD=embeds[0],
        lengths=(length,),
        images=[((start, stop),)],
        positions_T=positions[:, 0].long(),
    )


def _stages(run: Replay) -> list[StageReplay]:
    """Ours beside the recorded ones; one that removes nothing may be missing there."""
    facts = run.case.fact("stages")
    layers = [run.case.of(own, "rank_layer") for own in facts]
    ours = [
        stage for stage in run.trace.stages if stage.choice is not None or stage.layer in layers
    ]
    run.checks.equal("stages", [stage.layer for stage in ours], layers)
    return [
        StageReplay(run, run.case.of(own, "stage"), stage, own)
        for stage, own in zip(ours, facts, strict=False)
    ]


def _reach(run: Replay, stages: Sequence[StageReplay]) -> int:
    """Layers that have run when values can be compared for the last time: all of them, or with a
    cache those before the first selection."""
    layers = run.decoder.num_layers
    selections = [stage.stage.layer for stage in stages if _is_scored(stage)]
    cached = bool(run.case.fact("use_cache"))
    reach = min([layers, *selections]) if cached else layers
    causal = run.case.fact("causal_after_pruning")
    masked = run.case.fact("masked_entries_in_rebuilt_masks")
    # Where no layer runs behind a selection, a mask is without effect.
    if not cached or reach < layers:
        run.checks.equal("causal_after_pruning", not cached, causal)
        run.checks.equal("masked_entries_in_rebuilt_masks", cached, 0 in masked)
    return reach


def _is_scored(own: StageReplay) -> bool:
    return own.stage.choice is not None or own.recorded.get(own.prefix + "loss") is not None


def _check_stage(own: StageReplay, *, comparable: bool) -> None:
    own.check_lengths()
    own.expect("visual_in", own.stage.before.visual_tokens(0))
    own.expect("visual_out", own.stage.after.visual_tokens(0))
    if "pruned" in own.facts:
        own.expect("pruned", own.stage.choice is not None)
    if _is_scored(own):
        own.expect("proxy_layer", proxy_index(own.stage.layer, own.pruning.proxy_layer))
    if not comparable:
        return
    own.check_sides()
    if _is_scored(own):
        own.check_selection()
        result = own.saliency()
        own.check_scores(result, torch.ones(1))
        _check_facts(own, result)


def _check_facts(own: StageReplay, result: Saliency) -> None:
    """What the index says of the selection."""
    own.checks.close(own.prefix + "loss", result.loss_B, torch.tensor([own.fact("loss")]))
    start, stop = own.stage.before.images[0][0].span
    order = result.scores_T[start:stop].sort(descending=True, stable=True).indices.tolist()
    kept = own.kept(0)
    features_VD = own.stage.hidden_in_TD[start:stop]
    ranked = [token for token in order if token in set(kept)]
    strict = _unsuppressed(features_VD, ranked, own.pruning.similarity_threshold)
    if own.stage.choice is None:  # scored, though all stay
        own.checks.equal(own.prefix + "order_0", order, own.recorded[own.prefix + "order_0"])
    own.expect("first_pass_picks", strict)
    own.expect("second_pass_picks", len(kept) - strict)
    own.expect("differs_from_plain_topk_in", len(set(kept) - set(order[: len(kept)])))


def _unsuppressed(features_VD: Tensor, ranked: Sequence[int], threshold: float) -> int:
    """How many of the kept tokens, by falling score, strict suppression alone would have kept."""
    unit_VD = F.normalize(features_VD.float(), dim=-1)
    first: list[int] = []
    for token in ranked:
        if not bool((unit_VD[first] @ unit_VD[token] >= threshold).any()):
            first.append(token)
    return len(first)
