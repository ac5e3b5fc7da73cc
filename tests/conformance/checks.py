"""Comparison of replayed with recorded values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.conformance.files import Tensors

TOLERANCE = 2e-5
"""Bar for real-valued quantities in float32; see the tolerance table that comes with the data."""


@dataclass(slots=True)
class Checks:
    """What was compared in one case: largest errors by quantity, and every miss.

    limit: why a part of the record was left out, in a sentence; None if none was.
    """

    errors: dict[str, float] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    compared: int = 0
    limit: str | None = None

    def equal(self, name: str, got: object, expected: object) -> None:
        """Exact: indices, positions, lengths."""
        self.compared += 1
        got, expected = _plain(got), _plain(expected)
        if got != expected:
            self.misses.append(f"{name}: got {_short(got)}, recorded {_short(expected)}")

    def close(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Absolute error within the bar."""
        self._real(name, got, expected, torch.ones_like(expected))

    def close_relative(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Error within the bar times each recorded value; a recorded zero has to be met."""
        self._real(name, got, expected, expected.abs())

    def complete(self, recorded: Tensors) -> None:
        """Nothing of the record was left out."""
        self.misses += [f"{name}: recorded and not compared" for name in recorded.never_asked()]

    def _real(self, name: str, got: Tensor, expected: Tensor, size: Tensor) -> None:
        self.compared += 1
        if got.shape != expected.shape:
            self.misses.append(f"{name}: shape {list(got.shape)}, recorded {list(expected.shape)}")
            return
        error = (got - expected).abs()
        relative = torch.where(error == 0, error, error / size)
        worst = float(relative.max()) if relative.numel() else 0.0
        quantity = name.split(".")[-1].rstrip("0123456789").rstrip("_")
        self.errors[quantity] = max(worst, self.errors.get(quantity, 0.0))
        if not worst <= TOLERANCE:  # also true of NaN
            self.misses.append(f"{name}: error {worst:.2e} above {TOLERANCE:.0e}")


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
