"""What a decode step must know of the running requests, kept on the device between steps.

Shapes: B running requests, G layer groups between two pruning stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Rows:
    """One row per running request, in the cache's order, without holes.

    token_B: the token to feed next. position_GB: where it stands, per layer group. length_GB: keys
    and values stored. Rows past the last request hold a length of 1, so that a step may run over
    more rows than there are requests. The tensors stay where they are for good.
    """

    def __init__(self, *, groups: int, most: int, device: torch.device) -> None:
        self.count = 0
        self.token_B = torch.zeros(most, dtype=torch.int64, device=device)
        self.position_GB = torch.zeros(groups, most, dtype=torch.int64, device=device)
        self.length_GB = torch.ones(groups, most, dtype=torch.int64, device=device)

    def add(self) -> None:
        """A row at the end, to be filled by `set`."""
        self.count += 1

    def set(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        """Fill rows; `positions` and `lengths` are given per row, then per group."""
        device = self.token_B.device
        index = torch.tensor(rows, device=device)
        self.token_B[index] = torch.tensor(tokens, device=device)
        self.position_GB[:, index] = torch.tensor(positions, device=device).T
        self.length_GB[:, index] = torch.tensor(lengths, device=device).T

    def remove(self, row: int) -> None:
        """Take a row out; the last one moves into the hole."""
        self.count -= 1
        for tensor in (self.token_B, self.position_GB, self.length_GB):
            tensor[..., row] = tensor[..., self.count]
        self.length_GB[:, self.count] = 1
        self.position_GB[:, self.count] = 0
