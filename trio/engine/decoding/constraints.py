"""Structured answers: masks out the tokens with which an answer would not become what it must be.

Shapes: B rows (running requests), G rows with a constraint, V vocabulary, W = ceil(V / 32) words of
a mask, whose bit t % 32 of word t // 32 is token t's.

Masks depend on the newest token, of which the engine on a GPU knows only a step later. A mask is
written once the next step is on its way: the host then waits for tokens that are ready, and the
device for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trio.decoder.gpu import sent
from trio.engine.decoding.grammars import Grammars, GrammarWalk, invalidity, refusing
from trio.engine.decoding.sampler import Chosen
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Constraint, Result
from trio.engine.sequence import SequenceState
from trio.errors import UserError

KEPT = 256
"""Constraints that are held ready, where requests bring their own."""


class Walk(Protocol):
    """How far an answer is towards what it must be."""

    @property
    def is_whole(self) -> bool:
        """Whether the answer may end here."""

    def take(self, token: int) -> bool:
        """The next token, no stop token; whether it may come."""

    def mask(self, words_GW: Tensor, row: int) -> None:
        """Write which tokens may come next; stop tokens are any."""


class Trie:
    """Token sequences by their beginnings."""

    def __init__(self) -> None:
        self.next: dict[int, Trie] = {}
        self.is_whole = False

    def add(self, token_ids: Sequence[int]) -> None:
        node = self
        for token in token_ids:
            node = node.next.setdefault(token, Trie())
        node.is_whole = True


class TrieWalk:
    """How far an answer is along one of the sequences of a trie."""

    def __init__(self, root: Trie) -> None:
        self._node = root

    @property
    def is_whole(self) -> bool:
        return self._node.is_whole

    def take(self, token: int) -> bool:
        if token not in self._node.next:
            return False
        self._node = self._node.next[token]
        return True

    def mask(self, words_GW: Tensor, row: int) -> None:
        words_GW[row] = 0
        _set_bits(words_GW, row, list(self._node.next), True)


class Constrained:
    """The constraint of one request.

    `start`: makes a walk from the answer's beginning. `stop_ids`: tokens that end the answer.
    `text_of`: token ids to text, white space at its ends included.
    """

    def __init__(
        self,
        constraint: Constraint,
        start: Callable[[], Walk],
        stop_ids: Sequence[int],
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        self._constraint = constraint
        self._start = start
        self._stop_ids = stop_ids
        self._text_of = text_of
        self.restart()

    def restart(self) -> None:
        """Forget the answer so far."""
        self._walk: Walk | None = self._start()
        self._newest: tuple[Chosen, int] | None = None

    def note(self, chosen: Chosen, row: int) -> None:
        """The next token is that of a row, to be looked at when it has arrived."""
        self._newest = chosen, row

    def mask(self, words_GW: Tensor, row: int) -> None:
        """Write which tokens may come next; of an answer that has ended, all."""
        if self._newest is not None:
            chosen, place = self._newest
            self._walk, self._newest = self._after(chosen.token_ids[place]), None
        if self._walk is None:
            words_GW[row] = -1
            return
        self._walk.mask(words_GW, row)
        _set_bits(words_GW, row, self._stop_ids, self._walk.is_whole)

    def _after(self, token: int) -> Walk | None:
        """The walk with a further token; None where the answer has ended, or failed."""
        if self._walk is None or token in self._stop_ids or not self._walk.take(token):
            return None
        return self._walk

    def judge(self, result: Result) -> Result:
        """A finished result, in error where the answer is not what it must be."""
        is_cut = result.finish_reason in ("length", "repetition")
        if is_cut and not self._is_whole(result.token_ids):
            why = f"{len(result.token_ids)} tokens (max_new_tokens) are not enough"
            if result.finish_reason == "repetition":
                why = "it went round in a loop before it was whole (stop_repetition)"
            error = f"incomplete: {why}: {result.response!r}"
            return replace(result, finish_reason="error", error=error)
        regex, trouble = self._constraint.regex, None
        if self._constraint.json_schema is not None:
            trouble = invalidity(self._constraint.json_schema, result.response or "")
        elif regex is not None:
            text = self._text_of(result.token_ids if is_cut else result.token_ids[:-1])
            # A space may have come first that is none of the answer.
            forms = (text.strip(), text, text.removeprefix(" "))
            matching = [one for one in forms if re.fullmatch(regex, one, re.ASCII)]
            result = replace(result, response=(matching or [text])[0])
            trouble = None if matching else "it does not match"
        if trouble is None:
            return result
        error = f"constraint: {self._constraint.name}: {trouble}: {result.response!r}"
        return replace(result, finish_reason="error", error=error)

    def _is_whole(self, token_ids: Sequence[int]) -> bool:
        """Of an answer that no stop token has ended."""
        walk = self._start()
        return all(map(walk.take, token_ids)) and walk.is_whole


class Constraints:
    """Makes the constraints of requests to one model.

    `tokenizer`: of transformers. `prepare`: of the same model. `vocabulary`: as the logits have it.
    `eos`: the model's own stop tokens.
    """

    def __init__(
        self, tokenizer: Any, prepare: Preprocessor, *, vocabulary: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._prepare = prepare
        self._vocabulary = vocabulary
        self._eos = eos
        self._compiled = lru_cache(KEPT)(self._compile)

    def __call__(self, constraint: Constraint, stop_ids: frozenset[int]) -> Constrained:
        """Of one request, which these tokens end.

        Raises:
            UserError: it cannot be followed with this model.
        """
        if not stop_ids:
            raise UserError(f"{constraint.name}: the model has no end of sequence to end it with")
        compiled, stop = self._compiled(constraint), sorted(stop_ids)
        if isinstance(compiled, str):
            raise UserError(compiled)
        start: Callable[[], Walk] = partial(GrammarWalk, compiled, stop)
        if isinstance(compiled, Trie):
            start = partial(TrieWalk, compiled)
        with refusing(constraint.name):
            return Constrained(constraint, start, stop, self._prepare.text_of)

    def _compile(self, constraint: Constraint) -> Any:
        """A trie, or a grammar; a text that says why it cannot be followed, which is held as well:
        to find it out may take as long."""
        try:
            return self._trie(constraint) if constraint.choices else self._grammar(constraint)
        except UserError as error:
            return str(error)

    def _grammar(self, constraint: Constraint) -> Any:
        if isinstance(self._grammars, str):
            raise UserError(self._grammars)
        return self._grammars.compiled(constraint)

    def _trie(self, constraint: Constraint) -> Trie:
        trie = Trie()
        for choice in constraint.choices:
            for token_ids in self._prepare.spellings(choice):
                trie.add(token_ids)
        return trie

    @cached_property
    def _grammars(self) -> Grammars | str:
        """Or why the model has none."""
        try:
            return Grammars(
                self._tokenizer,
                self._prepare.decode,
                size=self._vocabulary,
                stop_ids=self._eos,
                threads=torch.get_num_threads(),
            )
        except UserError as error:
            return str(error)


class Masks:
    """Which tokens may come next, of the rows that have a constraint."""

    def __init__(self, sequences: Sequence[SequenceState], logits_BV: Tensor) -> None:
        self._rows = [row for row, one in enumerate(sequences) if one.constrained is not None]
        if not self._rows:
            return
        device, size = logits_BV.device, logits_BV.shape[-1]
        words_GW = torch.empty(
            len(self._rows), -(-size // 32), dtype=torch.int32, pin_memory=logits_BV.is_cuda
        )
        held = (one.constrained for one in sequences if one.constrained is not None)
        for place, constrained in enumerate(held):
            constrained.mask(words_GW, place)
        octets = words_GW.to(device, non_blocking=True).view(torch.uint8)
        bit = 1 << torch.arange(8, dtype=torch.uint8, device=device)
        self._shut_GV = (octets[:, :, None] & bit == 0).flatten(1)[:, :size]
        self._whole = len(self._rows) == len(logits_BV)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __call__(self, scores_BV: Tensor) -> None:
        """Shut out what may not come, in place."""
        if not self._rows:
            return
        if self._whole:
            scores_BV.masked_fill_(self._shut_GV, -torch.inf)
            return
        rows = sent(torch.tensor(self._rows), scores_BV.device)
        scores_BV[rows] = scores_BV[rows].masked_fill(self._shut_GV, -torch.inf)


def _set_bits(words_GW: Tensor, row: int, tokens: Sequence[int], value: bool) -> None:
    """Of tokens in a row of a mask; those past its end are none of the model's."""
    words_W = words_GW[row].numpy().view(np.uint32)
    ids = np.array([token for token in tokens if token < 32 * len(words_W)], dtype=np.int64)
    bits = np.uint32(1) << (ids % 32).astype(np.uint32)
    if value:
        np.bitwise_or.at(words_W, ids // 32, bits)
    else:
        np.bitwise_and.at(words_W, ids // 32, ~bits)
