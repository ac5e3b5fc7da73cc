"""State of one request in the engine. Loads no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trio.engine.decoding.repetition import RepetitionWatch
from trio.engine.kv_budget import Need
from trio.engine.request import FailureKind, Prepared, Sampling

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trio.engine.decoding.constraints import Constrained
    from trio.engine.decoding.logits_rules import Following


@dataclass(kw_only=True, slots=True, eq=False)
class SequenceState:
    """What the engine keeps of a request while it waits and runs."""

    key: int
    prepared: Prepared
    sampling: Sampling
    stop_ids: frozenset[int]
    spans: tuple[tuple[int, int], ...]
    """Where each image's tokens stand in the prompt."""
    need: Need
    """Tokens it may come to store in each layer group."""
    stream: random.Random
    submitted: float
    """Time of arrival, by `time.perf_counter`."""
    prefix: bytes | None = None
    """The same for prompts that begin alike, up to the end of their last image."""
    following: Following | None = None
    """The checkpoint's and the sampling's rules of decoding, if there are any."""
    watch: RepetitionWatch | None = None
    """Where an answer that loops is to end."""
    loops: bool = False
    """Whether it does."""
    constrained: Constrained | None = None
    """What the answer must be, and how far it is."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_logprobs: Tensor | None = None
    """As in the result."""
    candidate_logprobs: list[list[float]] = field(default_factory=list)
    candidate_is_top: list[list[bool]] = field(default_factory=list)
    """As in the result."""
    layer_tokens: list[int] = field(default_factory=list)
    """Prompt tokens present in each layer."""
    positions: list[int] = field(default_factory=list)
    """Position of the next token, per layer group."""
    kept: list[list[int | None]] = field(default_factory=list)
    """Visual tokens left after each stage; None is a tower's class token."""
    entered: list[int | None] = field(default_factory=list)
    """Visual tokens that entered the decoder, where the encoder reduced them."""
    scores: list[np.ndarray] = field(default_factory=list)
    """`Explanation.saliency`, where the request asks for it."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    failure: str | None = None
    """What has gone wrong with its numbers, or its constraint; ends it."""
    failure_kind: FailureKind = "numeric"
    tried_alone: bool = False
    """Whether the device ran out of memory over this request alone."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prepared.input_ids)

    @property
    def visual_tokens(self) -> int:
        return sum(self.prepared.image_tokens)

    @property
    def finish_reason(
        self,
    ) -> Literal["stop", "length", "repetition", "scored", "error"] | None:
        """Why nothing is added to the answer; None while something is."""
        if self.failure is not None:
            return "error"
        if self.candidate_logprobs:
            return "scored"
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            return "stop"
        if self.loops:
            return "repetition"
        if len(self.token_ids) == self.sampling.max_new_tokens:
            return "length"
        return None

    def append(self, token: int, logprob: float) -> None:
        """The answer's next token."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self.watch is not None:
            self.loops = self.watch.loops(token)

    def restart(self, stream: random.Random) -> None:
        """Forget the answer so far; `stream` is the request's random stream from its start."""
        self.stream, self.failure = stream, None
        if self.following is not None:
            self.following.restart()
        if self.watch is not None:
            self.watch.restart()
            self.loops = False
        if self.constrained is not None:
            self.constrained.restart()
        answer = (self.token_ids, self.logprobs, self.candidate_logprobs, self.candidate_is_top)
        read = (self.layer_tokens, self.positions, self.kept, self.entered, self.scores)
        for grown in (*answer, *read):
            grown.clear()
