"""Replay of TRIO on a LLaMA decoder (LLaVA): prefill with pruning, then greedy decoding.

Shapes: B samples of a case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from tests.conformance.replay import Replay, StageReplay, load_decoder
from trio.decoder.attention import Padded
from trio.decoder.decoder import Decoder
from trio.errors import UserError
from trio.prefill import PackedPrompts
from trio.pruning.options import Pruning
from trio.pruning.schedule import Schedule, Stage
from trio.pruning.scores.saliency import Saliency


def replay(case: Case, recorded: Tensors) -> Checks:
    """Run a recorded case on its own weights and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    decoder = _decoder(case)
    lengths = tuple(int(n) for n in recorded["attention_mask"].sum(dim=1))
    spans = [
        ((start, start + count),)
        for start, count in zip(
            case.fact("image_token_posi"), case.fact("image_tokens"), strict=True
        )
    ]
    embeds_TD = torch.cat(
        [own[:n] for own, n in zip(recorded["inputs_embeds"], lengths, strict=True)]
    )
    prompts = PackedPrompts(embeds_TD=embeds_TD, lengths=lengths, images=spans)
    run = Replay(case, recorded, decoder, prompts, _pruning(case))
    run.checks.equal("valid_lens", lengths, case.fact("valid_lens"))
    run.check_text()
    stages = case.fact("stages")
    run.checks.equal("stages", len(run.trace.stages), len(stages))
    for number, (stage, facts) in enumerate(zip(run.trace.stages, stages, strict=False)):
        _check_stage(StageReplay(run, number, stage, facts))
    run.check_cache_lengths()
    last = [length - 1 for length in run.done.cache_lengths[-1]]
    run.checks.equal("last_position_after_pruning", last, case.fact("last_position_after_pruning"))
    run.check_result()
    if recorded.get("decode_logits") is not None:
        _check_decoding(run)
    return run.checks


def _decoder(case: Case) -> Decoder:
    """The case's model, from its recorded configuration and weights."""
    settings, weights = case.model()
    options = dict(settings)
    rope = {"rope_type": "default", "rope_theta": options.pop("rope_theta", 10000.0)}
    return load_decoder(LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **options)), weights)


def _pruning(case: Case) -> Pruning:
    if case.fact("k_pos") != 4:
        raise UserError(
            f"case {case.name}: the loss has 4 positions here, not {case.fact('k_pos')}"
        )
    return Pruning(
        schedule=_schedule(case.fact("layer_list"), case.fact("image_token_list")),
        proxy_positions="reference",
        position_ids="renumber",
        similarity_threshold=case.fact("tau"),
        fill_up="reference",
    )


def _schedule(layers: Sequence[int], counts: Sequence[int]) -> Schedule:
    """The recorded list starts with the initial count; an entry of zero removes nothing."""
    if len(counts) != len(layers) + 1:
        raise UserError(f"image_token_list {counts} must be one longer than layer_list {layers}")
    stages, left = [], counts[0]
    for layer, count in zip(layers, counts[1:], strict=True):
        left = count or left
        stages.append(Stage(layer, left))
    return Schedule(tuple(stages))


def _check_stage(own: StageReplay) -> None:
    own.check_lengths()
    own.expect("pruned", own.stage.choice is not None)
    own.check_sides()
    mask = own.recorded.get(own.prefix + "mask_out")
    if mask is not None:
        own.checks.equal(own.prefix + "mask_out", own.stage.after.lengths, mask.sum(dim=1))
    if own.fact("pruned") and own.stage.choice is not None:
        own.check_selection()
        result = own.saliency()
        own.check_scores(result, _shares(own))
        _check_labels(own, result)


def _shares(own: StageReplay) -> Tensor:
    """The record has one loss over all samples: each has its share of the rows there, `[B]`."""
    rows = torch.tensor([len(read) for read in own.fact("loss_positions_and_pseudo_labels")])
    return rows / rows.sum()


def _check_labels(own: StageReplay, result: Saliency) -> None:
    labels = result.labels_R.split([len(rows) for rows in result.rows])
    for sample, read in enumerate(own.fact("loss_positions_and_pseudo_labels")):
        pairs = zip(result.rows[sample], labels[sample].tolist(), strict=True)
        got = [list(pair) for pair in pairs] if read else []
        own.checks.equal(f"{own.prefix}pseudo_labels_{sample}", got, read)


def _check_decoding(run: Replay) -> None:
    """Greedy steps on the pruned cache: each layer has its own length and next position."""
    decoder, cache, done = run.decoder, run.cache, run.done
    logits = done.logits_BV[0]
    for step, token in enumerate(run.recorded["decode_input_ids"].tolist()):
        run.checks.equal(f"decode_input_ids_{step}", int(logits.argmax()), token)
        with torch.no_grad(), decoder.ragged():
            hidden = decoder.embed(torch.tensor([token]))
            for layer in range(decoder.num_layers):
                position = torch.tensor([done.next_positions[layer][0] + step])
                keys = Padded(torch.tensor([cache.length(layer) + 1]))
                rotary = decoder.rotary(position)
                hidden = decoder.run_layers(layer, layer + 1, hidden, rotary, keys, cache)
            logits = decoder.head(hidden[0])
        run.checks.close(f"decode_logits_{step}", logits, run.recorded["decode_logits"][step])
    after = [cache.length(layer) for layer in range(decoder.num_layers)]
    run.checks.equal("decode_kv_lens_after", after, run.case.fact("decode_kv_lens_after"))
