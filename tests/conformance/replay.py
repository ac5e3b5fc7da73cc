"""A recorded case run through our prefill, and the comparisons that all decoders share.

Shapes: B samples of a case, S tokens of one, T packed tokens of all, A axes of positions, D hidden
size, V visual tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.decoder.decoder import Decoder
from trio.errors import UserError
from trio.prefill import PackedPrompts, StageTrace, Trace, prefill
from trio.pruning.options import Pruning
from trio.pruning.scores.layer_gradient import LayerGradient
from trio.pruning.scores.saliency import Saliency, proxy_index, saliency


def load_decoder(model: Any, weights: Tensors) -> Decoder:
    """A text decoder `model.model` and its head `model.lm_head` with recorded weights.

    Raises:
        UserError: weights are missing, unknown, or of another shape than the model's.
    """
    try:
        missing, unexpected = model.load_state_dict(weights.all, strict=False)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{weights.path}: does not fit the recorded config ({what})") from error
    if model.lm_head.weight is model.model.embed_tokens.weight:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise UserError(f"{weights.path}: weights missing {missing}, not known {unexpected}")
    return Decoder(model.model.eval(), model.lm_head.eval())


class Replay:
    """One case: its record, what our prefill made of it, and what came of comparing the two."""

    def __init__(
        self, case: Case, recorded: Tensors, decoder: Decoder, prompts: PackedPrompts, how: Pruning
    ) -> None:
        self.case = case
        self.recorded = recorded
        self.decoder = decoder
        self.prompts = prompts
        self.pruning = how
        self.checks = Checks()
        self.cache = ListCache()
        self.trace = Trace()
        self.done = prefill(decoder, prompts, how, self.cache, trace=self.trace)

    def check_text(self) -> None:
        """The rows outside the image of each sample are the embeddings of the recorded ids."""
        samples = self.prompts.embeds_TD.split(list(self.prompts.lengths))
        for sample, (own, ((start, stop),)) in enumerate(
            zip(samples, self.prompts.images, strict=True)
        ):
            text = torch.cat((own[:start], own[stop:]))
            with torch.no_grad():
                embedded = self.decoder.embed(self.recorded[f"text_ids_{sample}"].long())
            self.checks.close(f"text_embeds_{sample}", embedded, text)

    def check_cache_lengths(self) -> None:
        lengths = [max(own) for own in self.done.cache_lengths]
        self.checks.equal("kv_lens", lengths, self.recorded["kv_lens"])

    def check_result(self) -> None:
        """What leaves the decoder: hidden states and, of the last position, logits."""
        assert self.trace.hidden_TD is not None
        # After a stage behind the last layer these are fewer than that layer's keys.
        stages = self.trace.stages
        lengths = stages[-1].after.lengths if stages else self.prompts.lengths
        with torch.no_grad():
            final = self.decoder.model.norm(self.trace.hidden_TD).split(list(lengths))
            last_hidden = self.decoder.model.norm(self.done.hidden_BD)
        for sample, length in enumerate(lengths):
            expected = self.recorded["final_hidden"][sample, :length]
            self.checks.close(f"final_hidden_{sample}", final[sample], expected)
        self.checks.close("last_hidden", last_hidden, self.recorded["last_hidden"])
        self.checks.close("last_logits", self.done.logits_BV, self.recorded["last_logits"])


class StageReplay:
    """One stage of a case against its record.

    number: of the stage in the names of its tensors.
    facts: its entry in the index.
    """

    def __init__(
        self, replay: Replay, number: int, stage: StageTrace, facts: dict[str, Any]
    ) -> None:
        self.checks = replay.checks
        self.recorded = replay.recorded
        self.pruning = replay.pruning
        self.decoder = replay.decoder
        self.prefix = f"stage{number}."
        self.stage = stage
        self.facts = facts
        self.fact = partial(replay.case.of, facts)
        self.samples = range(len(stage.before.lengths))

    def expect(self, fact: str, got: object) -> None:
        """An entry of the index, to be met exactly."""
        self.checks.equal(self.prefix + fact, got, self.fact(fact))

    def check_lengths(self) -> None:
        self.expect("rank_layer", self.stage.layer)
        self.expect("seq_in", max(self.stage.before.lengths))
        self.expect("seq_out", max(self.stage.after.lengths))

    def check_sides(self) -> None:
        """Hidden states and positions, before and after."""
        stage = self.stage
        self._side("in", stage.hidden_in_TD, stage.positions_in_T, stage.before.lengths)
        self._side("out", stage.hidden_out_TD, stage.positions_out_T, stage.after.lengths)

    def _side(
        self, side: str, hidden_TD: Tensor, positions_T: Tensor, lengths: Sequence[int]
    ) -> None:
        """Recorded positions are `[B, S]` or `[A, B, S]`; a single row stands for all samples."""
        expected = self.recorded[f"{self.prefix}features_{side}"]
        positions = self.recorded[f"{self.prefix}position_ids_{side}"]
        positions = positions.expand(*positions.shape[:-2], len(lengths), -1)
        hidden = hidden_TD.split(list(lengths))
        places = positions_T.split(list(lengths), dim=-1)
        for sample, length in enumerate(lengths):
            name = f"{self.prefix}features_{side}_{sample}"
            self.checks.close(name, hidden[sample], expected[sample, :length])
            name = f"{self.prefix}position_ids_{side}_{sample}"
            self.checks.equal(name, places[sample], positions[..., sample, :length])

    def kept(self, sample: int) -> list[int]:
        """Local indices that stay."""
        choice = self.stage.choice
        kept = None if choice is None else choice.kept.get((sample, 0))
        count = self.stage.before.images[sample][0].count
        return list(range(count)) if kept is None else list(kept)

    def check_selection(self) -> None:
        choice = self.stage.choice
        for sample in self.samples:
            selected = self.recorded.get(f"{self.prefix}selected_{sample}")
            if selected is None:
                continue
            self.checks.equal(f"{self.prefix}selected_{sample}", self.kept(sample), selected)
            order = None if choice is None else choice.orders.get((sample, 0))
            if order is not None:
                expected = self.recorded[f"{self.prefix}order_{sample}"]
                self.checks.equal(f"{self.prefix}order_{sample}", order.tolist(), expected)

    def saliency(self) -> Saliency:
        """Of all tokens: the record has them also where none is dropped."""
        layer = proxy_index(self.stage.layer, self.pruning.proxy_layer)
        return saliency(
            LayerGradient(self.decoder, layer, self.pruning.proxy_head),
            self.stage.hidden_in_TD,
            self.stage.positions_in_T,
            self.stage.before.lengths,
            self.pruning.proxy_positions,
        )

    def check_scores(self, result: Saliency, share_B: Tensor) -> None:
        """Loss and norms.

        share_B: of each sample in the loss, which the record has one of.
        """
        lengths = self.stage.before.lengths
        loss = (result.loss_B * share_B).sum()
        self.checks.close(self.prefix + "loss", loss[None], self.recorded[self.prefix + "loss"])
        scores = result.true_scores(lengths).split(list(lengths))
        for sample, length in enumerate(lengths):
            got_S = scores[sample] * share_B[sample]
            expected_S = self.recorded[self.prefix + "grad_norm_all"][sample, :length]
            self.checks.close_relative(f"{self.prefix}grad_norm_all_{sample}", got_S, expected_S)
            visual = self.recorded.get(f"{self.prefix}scores_{sample}")
            if visual is not None:
                start, stop = self.stage.before.images[sample][0].span
                self.checks.close_relative(
                    f"{self.prefix}scores_{sample}", got_S[start:stop], visual
                )


class ListCache:
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
