"""Log-probabilities of given answers, all of a request from one prefill (teacher forcing).

A candidate's first token is scored by the prompt's logits; the others are read over the prompt's
cache, all candidates of many requests in one forward pass, and are not stored.
Shapes: B requests, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trio.engine.model_runner import ModelRunner
from trio.engine.sequence import SequenceState

HEAD_ROWS = 256
"""Tokens whose logits are in memory at a time."""
_Branch = tuple[int, int, tuple[int, ...]]
"""Of a candidate: row of its request, its number, its tokens."""


@torch.no_grad()
def candidate_logprobs(
    runner: ModelRunner,
    sequences: Sequence[SequenceState],
    logits_BV: Tensor,
    *,
    batch_tokens: int,
) -> list[list[list[float]]]:
    """Of each sequence and each of its candidates, the log-probability of each token.

    Args:
        sequences: with their prompts in the cache.
        logits_BV: of their last prompt tokens.
        batch_tokens: tokens of candidates that one pass computes, unless one alone has more.
    """
    candidates = [sequence.prepared.candidates for sequence in sequences]
    firsts = [[tokens[0] for tokens in own] for own in candidates]
    rows = torch.tensor([row for row, own in enumerate(firsts) for _ in own])
    scores = iter(_of_tokens(logits_BV[rows], [token for own in firsts for token in own]))
    found = [[[next(scores)] for _ in own] for own in firsts]
    for part in _parts(candidates, batch_tokens):
        members = sorted({row for row, _, _ in part})
        branches = [[list(tokens[:-1]) for row, _, tokens in part if row == own] for own in members]
        hidden_TD = runner.branch([sequences[row] for row in members], branches)
        wanted = [token for _, _, tokens in part for token in tokens[1:]]
        scores = iter(
            score
            for start in range(0, len(wanted), HEAD_ROWS)
            for score in _of_tokens(
                runner.decoder.head(hidden_TD[start : start + HEAD_ROWS]),
                wanted[start : start + HEAD_ROWS],
            )
        )
        for row, number, tokens in part:
            found[row][number] += [next(scores) for _ in tokens[1:]]
    return found


def _of_tokens(logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    index_T1 = torch.tensor(tokens, device=logits_TV.device)[:, None]
    exact = torch.promote_types(logits_TV.dtype, torch.float32)
    logprobs_TV = logits_TV.to(exact).log_softmax(dim=-1)
    scores: list[float] = logprobs_TV.gather(1, index_T1)[:, 0].tolist()
    return scores


def _parts(
    candidates: Sequence[Sequence[tuple[int, ...]]], batch_tokens: int
) -> Iterator[list[_Branch]]:
    """Candidates of more than one token, in order, as many at a time as one pass computes."""
    part: list[_Branch] = []
    size = 0
    for row, own in enumerate(candidates):
        for number, tokens in enumerate(own):
            if len(tokens) < 2:
                continue
            if part and size + len(tokens) - 1 > batch_tokens:
                yield part
                part, size = [], 0
            part.append((row, number, tokens))
            size += len(tokens) - 1
    if part:
        yield part
