"""Stages of a prefill, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trio.pruning.batch import Ragged
from trio.pruning.method import Choice, Stage, choose, goals_of
from trio.pruning.method_registry import create
from trio.pruning.options import Pruning


def chosen(
    pruning: Pruning,
    hidden_TD: Tensor,
    batch: Ragged,
    keeps: Sequence[Sequence[int] | None],
    *,
    layer: int = 1,
    decoder: Any = None,
    salts: Sequence[int] | None = None,
    **facts: Any,
) -> Choice | None:
    """What the method of some settings chooses; 0, 1, 2, ... are the positions of each request."""
    places = [torch.arange(length) for length in batch.lengths]
    stage = Stage(
        decoder=decoder,
        layer=layer,
        hidden_TD=hidden_TD,
        positions_T=torch.cat(places),
        coordinates_T2=torch.zeros(len(hidden_TD), 2),
        batch=batch,
        goals=goals_of(batch, keeps),
        salts=salts or [0] * len(batch.lengths),
        **facts,
    )
    return choose(create(pruning), stage)
