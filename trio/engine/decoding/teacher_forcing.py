"""Teacher forcing: logits along given answers, or along the model's own.

The prompt is prefilled and pruned as ever, and then one token after the other is decoded. A
checkpoint's rules of decoding take no part: what is compared are the model's raw logits.
Shapes: N tokens of an answer, B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trio.engine.admission import Admission
from trio.engine.decoding.generation_rules import Rules
from trio.engine.engine import end_of_sequence, not_finite
from trio.engine.loading import default_kv_bytes
from trio.engine.model_runner import ModelRunner
from trio.engine.request import Prepared, Result, Sampling, failed
from trio.engine.scheduler import Scheduler
from trio.engine.sequence import SequenceState
from trio.errors import UserError
from trio.families.adapter import Features
from trio.families.registry import adapt
from trio.pruning.batch import finite_rows
from trio.pruning.options import Pruning


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """token_ids: the one that stopped it included. logits_NV: what each follows from, on the
    device."""

    token_ids: tuple[int, ...]
    logits_NV: Tensor


class Answers:
    """Answers the same prompts again and again, under other settings of the pruning.

    `batch_tokens`, `max_running`: as of `Engine`.

    What the encoder makes of an image is kept in main memory as long as nothing reduces it there.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int,
        batch_tokens: int = 16384,
        max_running: int = 16,
    ) -> None:
        self.adapter = adapt(model)
        self._sampling = Sampling(max_new_tokens=max_new_tokens)
        self._eos = end_of_sequence(model, processor)
        rules = Rules.of(model)
        self.rules_off = tuple(rules.for_logits(rules.settle(self._sampling)))
        """Names of the checkpoint's rules of decoding that would change its greedy answers."""
        self._batch_tokens = batch_tokens
        self._max_running = max_running
        decoder = self.adapter.decoder
        self._kv_bytes = default_kv_bytes(decoder, batch_tokens)
        self._there = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
        self._features: dict[Any, list[Features]] = {}

    def __call__(
        self,
        pruning: Pruning,
        prompts: Sequence[Prepared],
        given: Mapping[Any, Sequence[int]] | None = None,
    ) -> Iterator[tuple[Any, Answer | Result]]:
        """Each prompt's id and answer, as they finish.

        Args:
            pruning: settings.
            prompts: with ids of their own.
            given: by id, the tokens along which each prompt is led; None takes the likeliest until
                the model stops.

        Yields:
            A failed result for a prompt that cannot be served.

        Raises:
            UserError: the pruning cannot be met by this model.
        """
        runner = ModelRunner(
            self.adapter, pruning, kv_bytes=self._kv_bytes, max_running=self._max_running
        )
        runner.graphs = None  # recording a step pays where it is run for long
        admission = Admission(runner, sampling=self._sampling, eos=self._eos)
        scheduler: Scheduler[SequenceState] = Scheduler(
            runner.cache, batch_tokens=self._batch_tokens
        )
        for prompt in prompts:
            sequence = admission(prompt if given is None else self._led(prompt, given[prompt.id]))
            if isinstance(sequence, SequenceState):
                scheduler.add(sequence)
            else:
                yield prompt.id, sequence
        while scheduler.waiting:
            if not (admitted := scheduler.admit()):
                raise UserError("the device has no memory for the keys and values of a prompt")
            yield from self._together(runner, scheduler, admitted, given)

    def _led(self, prompt: Prepared, answer: Sequence[int]) -> Prepared:
        """With room for this answer, however long the prompt's own may be."""
        sampling = prompt.sampling or self._sampling
        return replace(prompt, sampling=replace(sampling, max_new_tokens=len(answer)))

    def _together(
        self,
        runner: ModelRunner,
        scheduler: Scheduler[SequenceState],
        sequences: list[SequenceState],
        given: Mapping[Any, Sequence[int]] | None,
    ) -> Iterator[tuple[Any, Answer | Result]]:
        """Answers of the sequences that have just been admitted."""
        steps: dict[int, list[Tensor]] = {sequence.key: [] for sequence in sequences}
        logits_BV, _ = runner.prefill(sequences, self._encode(runner, sequences))
        _go_on(sequences, logits_BV, steps, given)
        runner.start([sequence for sequence in sequences if sequence.failure is None])
        while True:
            for sequence in list(scheduler.running.values()):
                if sequence.failure is not None:
                    scheduler.finish(sequence)
                    yield (
                        sequence.prepared.id,
                        failed(sequence.prepared.id, "numeric", sequence.failure),
                    )
                elif _complete(sequence, given):
                    scheduler.finish(sequence)
                    logits_NV = torch.stack(steps.pop(sequence.key))
                    token_ids = tuple(sequence.token_ids)
                    yield sequence.prepared.id, Answer(token_ids=token_ids, logits_NV=logits_NV)
            if not scheduler.running:
                return
            sequences = [scheduler.running[key] for key in runner.cache.order]
            logits_BV = runner.decode()
            _go_on(sequences, logits_BV, steps, given)
            fed = torch.tensor([sequence.token_ids[-1] for sequence in sequences])
            runner.cache.rows.token_B[: len(sequences)] = fed.to(logits_BV.device)

    def _encode(
        self, runner: ModelRunner, sequences: Sequence[SequenceState]
    ) -> list[list[Features]]:
        if runner.pruning.encoder != "none":
            return runner.encode(sequences)
        fresh = [sequence for sequence in sequences if sequence.prepared.id not in self._features]
        host = torch.empty(0, dtype=self._there.dtype)
        for sequence, features in zip(fresh, runner.encode(fresh), strict=True):
            self._features[sequence.prepared.id] = [image.to(host) for image in features]
        kept = (self._features[sequence.prepared.id] for sequence in sequences)
        return [[image.to(self._there) for image in features] for features in kept]


def _go_on(
    sequences: Sequence[SequenceState],
    logits_BV: Tensor,
    steps: Mapping[int, list[Tensor]],
    given: Mapping[Any, Sequence[int]] | None,
) -> None:
    """Give each sequence its next token, and note the logits that it follows from."""
    likeliest = logits_BV.argmax(dim=-1).tolist()
    are_finite = finite_rows(logits_BV).tolist()
    for sequence, logits_V, token, is_finite in zip(
        sequences, logits_BV, likeliest, are_finite, strict=True
    ):
        if not is_finite:
            sequence.failure = not_finite(sequence, logits_BV.dtype)
            continue
        steps[sequence.key].append(logits_V)
        if given is not None:
            token = given[sequence.prepared.id][len(sequence.token_ids)]
        sequence.token_ids.append(token)


def _complete(sequence: SequenceState, given: Mapping[Any, Sequence[int]] | None) -> bool:
    if given is None:
        return sequence.finish_reason is not None
    return len(sequence.token_ids) == len(given[sequence.prepared.id])
