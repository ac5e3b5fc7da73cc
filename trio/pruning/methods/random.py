"""Method `random`: the baseline that every other has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trio.pruning.flops import DecoderShape
from trio.pruning.method import Choice, Method, Stage


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Any tokens, each set as likely as another; the same ones for a request in any batch."""

    name = "random"
    summary = "any tokens, by a seed"

    seed: int

    def __call__(self, stage: Stage) -> Choice:
        orders = {}
        for (request, number), keep in stage.goals.items():
            salt = salt_of([self.seed, stage.salts[request], stage.layer, number]) >> 1
            generator = torch.Generator().manual_seed(salt)
            count = stage.batch.images[request][number].count
            orders[request, number] = torch.randperm(count, generator=generator)[:keep]
        return stage.choice_of_orders(orders, [])

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        return 0


class Salts(Sequence[int]):
    """`salt_of` the tokens of each request, computed when it is asked for."""

    def __init__(self, token_ids: Sequence[Sequence[int]]) -> None:
        self._token_ids = token_ids

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, request: Any) -> Any:
        return salt_of(self._token_ids[request])


def salt_of(token_ids: Sequence[int]) -> int:
    """A number that depends on a request's tokens alone, so that no batch changes its choice."""
    text = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
