"""Whether numbers are numbers. Shapes: R rows, N numbers of each."""

from __future__ import annotations

from torch import Tensor


def finite_rows(x_RN: Tensor) -> Tensor:
    """`[R]`, False where a row has a NaN or an infinity; nothing of the size of `x_RN` is held."""
    # Both pass on a NaN. A device is not asked: the outcome stays there.
    return x_RN.amax(dim=-1).isfinite() & x_RN.amin(dim=-1).isfinite()
