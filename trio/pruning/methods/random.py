"""Method `random`: the baseline that every other has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from trio.pruning.candidates import Candidates, StageChoice


def at_random(candidates: Candidates) -> StageChoice:
    """Any tokens, each set as likely as another; the same ones for a request in any batch."""
    picks = {}
    for (request, number), keep in candidates.goals.items():
        salt = candidates.salts[request]
        seed = salt_of([candidates.pruning.seed, salt, candidates.layer, number]) >> 1
        generator = torch.Generator().manual_seed(seed)
        count = candidates.ragged.images[request][number].count
        order = torch.randperm(count, generator=generator)
        picks[request, number] = sorted(order[:keep].tolist())
    return StageChoice(candidates.by_request(picks), [], None, {})


def salt_of(token_ids: Sequence[int]) -> int:
    """A number that depends on a request's tokens alone, so that no batch changes its choice."""
    text = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
