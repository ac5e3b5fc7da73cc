"""Log-probabilities of given answers, all of a request from one prefill (teacher forcing).

A candidate's first token is scored by the prompt's logits; the others are read over the prompt's
cache, the candidates of many requests in one forward pass, and are not stored. Where the logits
themselves are wanted, or a whole answer is long, `teacher_forcing` decodes along it.
Shapes: B requests, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trio.engine.model_runner import ModelRunner
from trio.engine.sequence import SequenceState

HEAD_ROWS = 256
"""Tokens of candidates whose logits are in memory at a time."""
WIDEST = 1024
"""Tokens of one request's candidates in a pass, unless one alone has more: each sees each in the
mask of attention."""


class TokenScore(NamedTuple):
    """Of one token of a candidate."""

    logprob: float
    is_top: bool
    """Whether the model itself finds no token likelier here."""


_Branch = tuple[int, int, tuple[int, ...]]
"""Of a candidate: row of its request, its number, its tokens."""


@torch.no_grad()
def candidate_scores(
    runner: ModelRunner,
    sequences: Sequence[SequenceState],
    logits_BV: Tensor,
    *,
    batch_tokens: int,
) -> list[list[list[TokenScore]]]:
    """Of each sequence and each of its candidates, how likely each token is.

    Args:
        sequences: with their prompts in the cache.
        logits_BV: of their last prompt tokens.
        batch_tokens: bounds what one pass reads, keys of prompts included, to twice as many.
    """
    candidates = [sequence.prepared.candidates for sequence in sequences]
    rows = [row for row, own in enumerate(candidates) for _ in own]
    firsts = [tokens[0] for own in candidates for tokens in own]
    scores = _of_tokens(logits_BV, rows, firsts)
    found = [[[next(scores)] for _ in own] for own in candidates]
    stored = [max(sequence.layer_tokens) for sequence in sequences]
    for part in _parts(candidates, stored, 2 * batch_tokens):
        members = sorted({row for row, _, _ in part})
        branches = [[tokens[:-1] for row, _, tokens in part if row == own] for own in members]
        hidden_TD = runner.branch([sequences[row] for row in members], branches)
        scores = iter(_scores(runner, hidden_TD, [t for _, _, tokens in part for t in tokens[1:]]))
        for row, number, tokens in part:
            found[row][number] += [next(scores) for _ in tokens[1:]]
    return found


def _scores(runner: ModelRunner, hidden_TD: Tensor, tokens: Sequence[int]) -> Iterator[TokenScore]:
    """Of each token behind its hidden state."""
    for start in range(0, len(tokens), HEAD_ROWS):
        wanted = tokens[start : start + HEAD_ROWS]
        logits_TV = runner.decoder.head(hidden_TD[start : start + HEAD_ROWS])
        yield from _of_tokens(logits_TV, range(len(wanted)), wanted)


def _of_tokens(
    logits_TV: Tensor, rows: Sequence[int], tokens: Sequence[int]
) -> Iterator[TokenScore]:
    """Of tokens by rows of logits, which several may share."""
    exact = torch.promote_types(logits_TV.dtype, torch.float32)
    logprobs_TV = logits_TV.to(exact).log_softmax(dim=-1)
    own_N = logprobs_TV[rows, tokens]
    is_top_N = own_N >= logprobs_TV.amax(dim=-1)[rows]
    pairs = zip(own_N.tolist(), is_top_N.tolist(), strict=True)
    return (TokenScore(logprob, is_top) for logprob, is_top in pairs)


def _parts(
    candidates: Sequence[Sequence[tuple[int, ...]]], stored: Sequence[int], most: int
) -> Iterator[list[_Branch]]:
    """Candidates of more than one token, in order, as many at a time as one pass takes.

    Args:
        candidates: of each request.
        stored: tokens of each prompt.
        most: keys of a pass, which come in a rectangle as long as the longest row of its requests.
    """
    part: list[_Branch] = []
    widths: dict[int, int] = {}
    for row, own in enumerate(candidates):
        for number, tokens in enumerate(own):
            if len(tokens) < 2:
                continue
            grown = widths | {row: widths.get(row, 0) + len(tokens) - 1}
            widest = max(grown.values())
            longest = max(stored[member] for member in grown) + widest
            if part and (widest > WIDEST or len(grown) * longest > most):
                yield part
                part, grown = [], {row: len(tokens) - 1}
            part.append((row, number, tokens))
            widths = grown
    if part:
        yield part
