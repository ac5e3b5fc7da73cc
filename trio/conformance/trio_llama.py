"""Replay of TRIO on a LLaMA decoder (LLaVA): prefill with pruning, then greedy decoding.

Shapes: B samples of a case, S tokens of one, T packed tokens of all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trio.config import Pruning
from trio.conformance.checks import Checks
from trio.conformance.files import Case, Tensors
from trio.errors import UserError
from trio.models.attention import Padded
from trio.models.decoder import Decoder
from trio.models.prefill import PackedPrompts, Prefilled, StageTrace, Trace, prefill
from trio.pruning.saliency import Saliency, saliency
from trio.pruning.schedule import Schedule, Stage


def replay(case: Case) -> Checks:
    """Run a recorded case on its own weights and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    recorded = case.tensors()
    decoder = load_decoder(case)
    checks = Checks()
    lengths = tuple(int(n) for n in recorded["attention_mask"].sum(dim=1))
    checks.equal("valid_lens", lengths, case.fact("valid_lens"))
    spans = [
        ((start, start + count),)
        for start, count in zip(
            case.fact("image_token_posi"), case.fact("image_tokens"), strict=True
        )
    ]
    embeds_TD = torch.cat(
        [own[:n] for own, n in zip(recorded["inputs_embeds"], lengths, strict=True)]
    )
    _check_embeddings(checks, decoder, recorded, spans, lengths)
    cache, trace = _ListCache(), Trace()
    prompts = PackedPrompts(embeds_TD=embeds_TD, lengths=lengths, images=spans)
    done = prefill(decoder, prompts, _pruning(case), cache, trace=trace)
    stages = case.fact("stages")
    checks.equal("stages", len(trace.stages), len(stages))
    for number, (stage, facts) in enumerate(zip(trace.stages, stages, strict=False)):
        _Stage(checks, case, recorded, decoder, number, stage, facts).compare()
    _check_result(checks, case, recorded, decoder, done, trace)
    if recorded.get("decode_logits") is not None:
        _check_decoding(checks, case, recorded, decoder, done, cache)
    return checks


def load_decoder(case: Case) -> Decoder:
    """The case's model, from its recorded configuration and weights."""
    settings, weights = case.model()
    options = dict(settings)
    rope = {"rope_type": "default", "rope_theta": options.pop("rope_theta", 10000.0)}
    model = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **options)).eval()
    try:
        missing, unexpected = model.load_state_dict(weights.all, strict=False)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{weights.path}: does not fit the recorded config ({what})") from error
    if options.get("tie_word_embeddings") and missing == ["lm_head.weight"]:
        missing = []
    if missing or unexpected:
        raise UserError(f"{weights.path}: weights missing {missing}, not known {unexpected}")
    return Decoder(model.model, model.lm_head)


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


def _check_embeddings(
    checks: Checks,
    decoder: Decoder,
    recorded: Tensors,
    spans: Sequence[Sequence[tuple[int, int]]],
    lengths: Sequence[int],
) -> None:
    for sample, (((start, stop),), length) in enumerate(zip(spans, lengths, strict=True)):
        own = recorded["inputs_embeds"][sample, :length]
        text = torch.cat((own[:start], own[stop:]))
        with torch.no_grad():
            embedded = decoder.embed(recorded[f"text_ids_{sample}"].long())
        checks.close(f"text_embeds_{sample}", embedded, text)


class _Stage:
    """One stage of a case against its record."""

    def __init__(
        self,
        checks: Checks,
        case: Case,
        recorded: Tensors,
        decoder: Decoder,
        number: int,
        stage: StageTrace,
        facts: dict[str, Any],
    ) -> None:
        self.checks = checks
        self.recorded = recorded
        self.decoder = decoder
        self.prefix = f"stage{number}."
        self.stage = stage
        self.fact = partial(case.of, facts)
        self.samples = range(len(stage.before.lengths))

    def compare(self) -> None:
        stage = self.stage
        self.checks.equal(self.prefix + "rank_layer", stage.layer, self.fact("rank_layer"))
        self.checks.equal(self.prefix + "seq_in", max(stage.before.lengths), self.fact("seq_in"))
        self.checks.equal(self.prefix + "seq_out", max(stage.after.lengths), self.fact("seq_out"))
        self.checks.equal(self.prefix + "pruned", stage.choice is not None, self.fact("pruned"))
        self._side("in", stage.hidden_in_TD, stage.positions_in_T, stage.before.lengths)
        self._side("out", stage.hidden_out_TD, stage.positions_out_T, stage.after.lengths)
        mask = self.recorded.get(self.prefix + "mask_out")
        if mask is not None:
            self.checks.equal(self.prefix + "mask_out", stage.after.lengths, mask.sum(dim=1))
        if self.fact("pruned") and stage.choice is not None:
            self._selection()
            self._scores(self._saliency())

    def _side(
        self, side: str, hidden_TD: Tensor, positions_T: Tensor, lengths: Sequence[int]
    ) -> None:
        expected = self.recorded[f"{self.prefix}features_{side}"]
        positions = self.recorded[f"{self.prefix}position_ids_{side}"].expand(len(lengths), -1)
        hidden, places = hidden_TD.split(list(lengths)), positions_T.split(list(lengths))
        for sample, length in enumerate(lengths):
            name = f"{self.prefix}features_{side}_{sample}"
            self.checks.close(name, hidden[sample], expected[sample, :length])
            name = f"{self.prefix}position_ids_{side}_{sample}"
            self.checks.equal(name, places[sample], positions[sample, :length])

    def _selection(self) -> None:
        choice = self.stage.choice
        assert choice is not None
        for sample in self.samples:
            selected = self.recorded.get(f"{self.prefix}selected_{sample}")
            if selected is None:
                continue
            image = self.stage.before.images[sample][0]
            kept = choice.kept[sample][0]
            got = list(range(image.count)) if kept is None else list(kept)
            self.checks.equal(f"{self.prefix}selected_{sample}", got, selected)
            order = choice.orders.get((sample, 0))
            if order is not None:
                expected = self.recorded[f"{self.prefix}order_{sample}"]
                self.checks.equal(f"{self.prefix}order_{sample}", order.tolist(), expected)

    def _saliency(self) -> Saliency:
        """Of all tokens: the record has them also where none is dropped."""
        return saliency(
            self.decoder.proxy(self.stage.layer),
            self.stage.hidden_in_TD,
            self.stage.positions_in_T,
            self.stage.before.lengths,
            "reference",
        )

    def _scores(self, result: Saliency) -> None:
        """The record has one loss over all samples, so each has its share of the rows there."""
        lengths = self.stage.before.lengths
        read = self.fact("loss_positions_and_pseudo_labels")
        rows = torch.tensor([len(own) for own in read])
        share_B = rows / rows.sum()
        loss = (result.loss_B * share_B).sum()
        self.checks.close(self.prefix + "loss", loss[None], self.recorded[self.prefix + "loss"])
        labels = result.labels_R.split([len(own) for own in result.rows])
        for sample, own in enumerate(read):
            pairs = zip(result.rows[sample], labels[sample].tolist(), strict=True)
            got = [list(pair) for pair in pairs] if own else []
            self.checks.equal(f"{self.prefix}pseudo_labels_{sample}", got, own)
        scores = result.true_scores(lengths).split(list(lengths))
        for sample, length in enumerate(lengths):
            got_S = scores[sample] * share_B[sample]
            expected_S = self.recorded[self.prefix + "grad_norm_all"][sample, :length]
            self.checks.close_relative(f"{self.prefix}grad_norm_all_{sample}", got_S, expected_S)
            visual = self.recorded.get(f"{self.prefix}scores_{sample}")
            if visual is not None:
                image = self.stage.before.images[sample][0]
                got_V = got_S[image.start : image.start + image.count]
                self.checks.close_relative(f"{self.prefix}scores_{sample}", got_V, visual)


def _check_result(
    checks: Checks,
    case: Case,
    recorded: Tensors,
    decoder: Decoder,
    done: Prefilled,
    trace: Trace,
) -> None:
    lengths = done.cache_lengths[-1]
    checks.equal("kv_lens", [max(own) for own in done.cache_lengths], recorded["kv_lens"])
    last = [length - 1 for length in lengths]
    checks.equal("last_position_after_pruning", last, case.fact("last_position_after_pruning"))
    assert trace.hidden_TD is not None
    with torch.no_grad():
        final = decoder.model.norm(trace.hidden_TD).split(lengths)
        last_hidden = decoder.model.norm(done.hidden_BD)
    for sample, length in enumerate(lengths):
        expected = recorded["final_hidden"][sample, :length]
        checks.close(f"final_hidden_{sample}", final[sample], expected)
    checks.close("last_hidden", last_hidden, recorded["last_hidden"])
    checks.close("last_logits", done.logits_BV, recorded["last_logits"])


def _check_decoding(
    checks: Checks,
    case: Case,
    recorded: Tensors,
    decoder: Decoder,
    done: Prefilled,
    cache: _ListCache,
) -> None:
    """Greedy steps on the pruned cache: each layer has its own length and next position."""
    fed = recorded["decode_input_ids"].tolist()
    logits = done.logits_BV[0]
    for step, token in enumerate(fed):
        checks.equal(f"decode_input_ids_{step}", int(logits.argmax()), token)
        with torch.no_grad(), decoder.ragged():
            hidden = decoder.embed(torch.tensor([token]))
            for layer in range(decoder.num_layers):
                position = torch.tensor([done.next_positions[layer][0] + step])
                keys = Padded.of([cache.length(layer) + 1], hidden.device)
                rotary = decoder.rotary(position)
                hidden = decoder.run_layers(layer, layer + 1, hidden, rotary, keys, cache)
            logits = decoder.head(hidden[0])
        checks.close(f"decode_logits_{step}", logits, recorded["decode_logits"][step])
    after = [cache.length(layer) for layer in range(decoder.num_layers)]
    checks.equal("decode_kv_lens_after", after, case.fact("decode_kv_lens_after"))


class _ListCache:
    """Keys and values of one sequence, as long as each layer has them."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin_prefill(self, first_layer: int, lengths: tuple[int, ...]) -> None:
        """Nothing to lay out: a batch is never decoded here."""

    def length(self, layer: int) -> int:
        return self._layers[layer][0].shape[2]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self._layers:
            before = self._layers[layer_idx]
            key, value = torch.cat((before[0], key), 2), torch.cat((before[1], value), 2)
        self._layers[layer_idx] = (key, value)
        return key, value
