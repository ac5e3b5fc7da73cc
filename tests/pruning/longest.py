"""A method as a user would write one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

import trio
from trio.pruning.flops import DecoderShape


@dataclass(frozen=True, kw_only=True)
class Longest(trio.Method):
    """The tokens of the longest hidden states, or of the shortest."""

    name = "longest"
    summary = "length of the hidden state"

    power: float = 2.0
    end: Literal["long", "short"] = "long"
    flipped: bool = False

    def __call__(self, stage: trio.Stage) -> trio.Choice:
        hidden_TD, *_ = stage.packed
        scores_T = torch.linalg.vector_norm(hidden_TD.float(), ord=self.power, dim=-1)
        falls = (self.end == "long") != self.flipped
        order_NV = stage.rank(scores_T if falls else -scores_T)
        return stage.choice(order_NV[:, : stage.most_kept], order_NV, scores_T)

    def flops(self, shape: DecoderShape, tokens: int, images: Sequence[tuple[int, int]]) -> int:
        return tokens * shape.hidden_size
