"""Applies decoding rules with the logits processors of transformers.

Shapes: B rows (running requests), G rows whose rules are the same, V vocabulary, S tokens of a
prompt and its answer so far.

Rules look at the tokens so far, of which the engine on a GPU knows the newest only a step later.
Each request that has rules therefore keeps its tokens on the device as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trio.decoder.gpu import sent
from trio.engine.decoding.constraints import Masks
from trio.engine.decoding.generation_rules import CUTS, FILE, OTHER_CUTS, Rules
from trio.engine.decoding.sampler import Chosen
from trio.engine.request import Sampling
from trio.engine.sequence import SequenceState
from trio.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What processors must know of the answer that they are made for."""

    prompt_1S: Any
    """Tensor of token ids."""
    most: int
    """New tokens at most."""
    eos: list[int]
    device: str
    begins_forced: bool

    @property
    def start(self) -> int:
        return len(self.prompt_1S[0])

    @property
    def first_free(self) -> int:
        """Tokens before the first that is not forced."""
        return int(self.start + (self.start == 1 and self.begins_forced))


_MAKERS: dict[str, Callable[[Any, _Answer], Any]] = {
    "sequence_bias": lambda x, a: SequenceBiasLogitsProcessor(x),
    "encoder_repetition_penalty": lambda x, a: EncoderRepetitionPenaltyLogitsProcessor(
        float(x), a.prompt_1S
    ),
    "repetition_penalty": lambda x, a: RepetitionPenaltyLogitsProcessor(float(x)),
    "no_repeat_ngram_size": lambda x, a: NoRepeatNGramLogitsProcessor(int(x)),
    "encoder_no_repeat_ngram_size": lambda x, a: EncoderNoRepeatNGramLogitsProcessor(
        int(x), a.prompt_1S
    ),
    "bad_words_ids": lambda x, a: NoBadWordsLogitsProcessor(x, a.eos or None),
    "min_length": lambda x, a: MinLengthLogitsProcessor(x, a.eos, a.device),
    "min_new_tokens": lambda x, a: MinNewTokensLengthLogitsProcessor(a.start, x, a.eos, a.device),
    "forced_bos_token_id": lambda x, a: ForcedBOSTokenLogitsProcessor(x),
    "forced_eos_token_id": lambda x, a: ForcedEOSTokenLogitsProcessor(
        a.start + a.most, x, a.device
    ),
    "remove_invalid_values": lambda x, a: InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda x, a: ExponentialDecayLengthPenalty(
        tuple(x), a.eos, a.start
    ),
    "suppress_tokens": lambda x, a: SuppressTokensLogitsProcessor(x, a.device),
    "begin_suppress_tokens": lambda x, a: SuppressTokensAtBeginLogitsProcessor(
        x, a.first_free, a.device
    ),
    "temperature": lambda x, a: TemperatureLogitsWarper(float(x)),
    "top_h": lambda x, a: TopHLogitsWarper(x),
    "top_k": lambda x, a: TopKLogitsWarper(int(x)),
    "top_p": lambda x, a: TopPLogitsWarper(x),
    "min_p": lambda x, a: MinPLogitsWarper(x),
    "typical_p": lambda x, a: TypicalLogitsWarper(x),
    "epsilon_cutoff": lambda x, a: EpsilonLogitsWarper(x),
    "eta_cutoff": lambda x, a: EtaLogitsWarper(x, device=a.device),
}
"""By what each is done, in the order of `generate`."""
_OF_THE_END = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")


class Following:
    """The rules of one request, and the tokens that they look at.

    processors: in their order. prompt: its tokens, placeholders of images included.
    room: tokens that may follow it.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        prompt: Sequence[int],
        room: int,
        device: torch.device,
    ) -> None:
        self.processors: Any = processors  # which claim to take a LongTensor only
        self._prompt = prompt
        self._room = room
        self._device = device
        self._ids: Tensor | None = None
        self._count = len(prompt)

    @property
    def kind(self) -> object:
        """Requests of one kind may go through the processors of any of them, together."""
        only = self.processors[0]
        alone = len(self.processors) == 1
        if alone and isinstance(only, RepetitionPenaltyLogitsProcessor):
            return only.penalty
        return self

    @property
    def ids_S(self) -> Tensor:
        if self._ids is None:
            ids = torch.tensor([*self._prompt, *[0] * self._room])
            self._ids = ids.to(self._device)
        return self._ids[: self._count]

    def add(self, token: Tensor) -> None:
        """The next token, on the device."""
        assert self._ids is not None, "rules come before the choice"
        self._ids[self._count] = token
        self._count += 1

    def restart(self) -> None:
        """Forget the answer so far."""
        self._ids = None
        self._count = len(self._prompt)


def follow(
    rules: Rules,
    sampling: Sampling,
    prompt: Sequence[int],
    *,
    eos: frozenset[int],
    device: torch.device,
    lag: int = 0,
) -> tuple[Sampling, Following | None]:
    """What is left of a sampling for `choose`, and what is applied before; None where nothing is.

    eos: tokens that end the answer. lag: steps that may run after its last token.
    """
    sampling = rules.settle(sampling)
    asked, cuts = rules.for_logits(sampling), rules.for_draws(sampling)
    if cuts:
        own = {name: getattr(sampling, name) for name in CUTS}
        cuts |= {name: value for name, value in own.items() if value != CUTS[name]}
        cuts["temperature"] = sampling.temperature
        sampling = replace(sampling, temperature=1.0, **CUTS)
    if not eos:
        asked = {name: value for name, value in asked.items() if name not in _OF_THE_END}
    asked |= cuts
    if not asked:
        return sampling, None
    answer = _Answer(
        prompt_1S=torch.tensor(prompt, device=device)[None],
        most=sampling.max_new_tokens,
        eos=sorted(eos),
        device=str(device),
        begins_forced="forced_bos_token_id" in asked,
    )
    made = [make(asked[name], answer) for name, make in _MAKERS.items() if name in asked]
    room = sampling.max_new_tokens + lag
    return sampling, Following(LogitsProcessorList(made), prompt, room, device)


def check(rules: Rules, prompt: Sequence[int], vocabulary: int, eos: frozenset[int]) -> None:
    """Apply all rules once, so that one that cannot be followed is told before any request.

    Raises:
        UserError: naming it.
    """
    for name, value in rules.values.items():
        one = Rules(values={name: value})
        sampling = Sampling(max_new_tokens=1, temperature=float(name in OTHER_CUTS))
        try:
            _, found = follow(one, sampling, prompt, eos=eos, device=torch.device("cpu"))
            if found is not None:
                found.processors(found.ids_S[None], torch.zeros(1, vocabulary))
        except Exception as error:  # what transformers raises over odd values is not documented
            raise UserError(
                f"{FILE}: {name} {value!r} cannot be followed: {first_line(error)}; correct it"
            ) from error


def ruled(sequences: Sequence[SequenceState], logits_BV: Tensor) -> Tensor | None:
    """Logits `[B, V]` float32 after each row's rules and constraint; None where no row has any."""
    masks = Masks(sequences, logits_BV)
    groups: dict[object, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.following is not None:
            groups.setdefault(sequence.following.kind, []).append(row)
    if not groups and not masks:
        return None
    scores_BV = logits_BV.to(torch.float32, copy=True)
    masks(scores_BV)  # first, so that cuts leave something of what is left
    for rows in groups.values():
        members = [following for row in rows if (following := sequences[row].following) is not None]
        ids_GS = _together([member.ids_S for member in members])
        if len(rows) == len(sequences):
            scores_BV = members[0].processors(ids_GS, scores_BV)
            break
        index_G = sent(torch.tensor(rows), scores_BV.device)
        scores_BV[index_G] = members[0].processors(ids_GS, scores_BV[index_G])
    if groups:
        masks(scores_BV)  # what is forced may be shut out
    return scores_BV


def note(sequences: Sequence[SequenceState], chosen: Chosen) -> None:
    """Add the tokens chosen to those that rules and constraints look at next."""
    for row, sequence in enumerate(sequences):
        if sequence.following is not None:
            sequence.following.add(chosen.tokens_B[row])
        if sequence.constrained is not None:
            sequence.constrained.note(chosen, row)


def _together(ids: Sequence[Tensor]) -> Tensor:
    """`[G, S]`: shorter ones end in repeats of their last token, which no penalty counts twice."""
    if len(ids) == 1:
        return ids[0][None]
    device = ids[0].device
    lengths = sent(torch.tensor([len(own) for own in ids]), device)
    offset_S = torch.arange(max(map(len, ids)), device=device)
    inside = torch.minimum(offset_S, lengths[:, None] - 1)
    return torch.cat(list(ids))[inside + (lengths.cumsum(0) - lengths)[:, None]]
