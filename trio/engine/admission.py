"""Admission control: rejects requests that can never be served, turns the rest into sequences."""

from __future__ import annotations

import itertools
import time

from trio.engine.decoding.constraints import Constraints
from trio.engine.decoding.generation_rules import Rules
from trio.engine.decoding.logits_rules import follow
from trio.engine.decoding.repetition import RepetitionWatch
from trio.engine.decoding.sampler import stream
from trio.engine.model_runner import ModelRunner
from trio.engine.request import Prepared, Result, Sampling, failed
from trio.engine.sequence import SequenceState
from trio.engine.sharing.prefix_cache import prefix_of
from trio.errors import UserError


class Admission:
    """Checks prepared requests one by one, before any of them costs device time.

    `sampling`: for requests without their own. `eos`: the model's own stop tokens. `rules`: the
    checkpoint's rules of decoding; None follows none. `constraints`: what makes an answer's
    constraint; None for requests without.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        sampling: Sampling,
        eos: frozenset[int],
        rules: Rules | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self._runner = runner
        self._sampling = sampling
        self._eos = eos
        self._rules = rules or Rules(values={})
        self._constraints = constraints
        self._keys = itertools.count()

    def __call__(self, prepared: Prepared) -> SequenceState | Result:
        """A sequence, or a failed result where the request can never be served."""
        runner, sampling = self._runner, prepared.sampling or self._sampling
        prompt, new = len(prepared.input_ids), sampling.max_new_tokens
        stored = new
        if not all(prepared.candidates):
            return failed(prepared.id, "prompt", "a candidate without tokens")
        if prepared.candidates:
            new, stored = max(map(len, prepared.candidates)), 1
        if not prompt:
            return failed(prepared.id, "prompt", "the prompt has no tokens")
        if len(prepared.image_inputs) != len(prepared.image_tokens):
            numbers = f"{len(prepared.image_inputs)} and {len(prepared.image_tokens)}"
            message = f"image_inputs and image_tokens speak of {numbers} images"
            return failed(prepared.id, "mismatch", message)
        if runner.needs_instruction and prepared.image_tokens and not prepared.instruction_ids:
            message = f"method {runner.pruning.method} needs a prompt with words of its own"
            return failed(prepared.id, "prompt", message)
        if 0 in prepared.image_tokens:
            return failed(prepared.id, "mismatch", "an image without placeholder tokens")
        try:
            for image in prepared.image_inputs:
                runner.adapter.check_inputs(image)
            spans = runner.adapter.spans(prepared.input_ids, prepared.image_tokens)
        except UserError as error:
            return failed(prepared.id, "mismatch", str(error))
        size = f"{prompt} prompt tokens and up to {new} new ones"
        if prompt - runner.left_out(prepared.image_tokens) + new > runner.decoder.max_positions:
            message = f"{size} pass the model's context of {runner.decoder.max_positions}"
            return failed(prepared.id, "too_long", message)
        need = runner.need(prompt, prepared.image_tokens, stored)
        if not runner.cache.fits(need):
            message = f"{size} pass the KV cache of {runner.cache.budget} bytes"
            return failed(prepared.id, "no_room", message)
        stop = frozenset(sampling.stop_token_ids)
        constrained = None
        if self._constraints and sampling.constraint and not prepared.candidates:
            try:
                constrained = self._constraints(sampling.constraint, self._eos | stop)
            except UserError as error:
                return failed(prepared.id, "constraint", str(error))
        sampling, following = follow(
            self._rules,
            sampling,
            prepared.input_ids,
            eos=self._eos | stop,
            device=runner.decoder.device,
            lag=runner.lag,
        )
        own = frozenset() if sampling.ignore_eos else self._eos
        return SequenceState(
            key=next(self._keys),
            prepared=prepared,
            sampling=sampling,
            stop_ids=own | stop,
            spans=tuple(spans),
            need=need,
            stream=stream(sampling),
            submitted=time.perf_counter(),
            prefix=prefix_of(prepared, spans) if runner.prefixes.depth else None,
            following=following,
            watch=_watch(sampling),
            constrained=constrained,
        )


def _watch(sampling: Sampling) -> RepetitionWatch | None:
    times = sampling.stop_repetition
    return None if times is None else RepetitionWatch(times)
