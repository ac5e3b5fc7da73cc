"""Linear layers with the same input as one product on a CPU.

Their weights are copied, one under the other and in oneDNN's layout, so that few rows are fast. A
copy that is no longer like its source must never be used: every product looks at where the weights
lie and how often they were written to, which tells of all edits but those through `.data`. Of these
`check` tells, which reads all weights.

Shapes: N rows, I inputs, O outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trio.decoder import onednn

_State = tuple[tuple[int, int, int], ...]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class _Copy(NamedTuple):
    state: _State
    sums: list[int]
    """Of the weights that were copied."""
    held: list[tuple[Tensor, Tensor]]
    """These with their memory, so that nothing else comes to lie there."""
    weight: Tensor
    bias: Tensor | None


class SideBySide:
    """Some linear layers of one input, in this order.

    Args:
        linears: with weights `[., I]` on a CPU, of one dtype.
        copied: their weights may be copied; else each product reads them as they are.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, copied: bool) -> None:
        self._linears = tuple(linears)
        self._copied = copied and not any(p.is_inference() for p in self._parameters())
        self._has_bias = any(linear.bias is not None for linear in linears)
        self._copy: _Copy | None = None
        """Replaced as a whole, since engines in other threads may use it."""

    def __call__(self, x_NI: Tensor, plus_NO: Tensor | None = None) -> Tensor:
        """`[N, O]`, added to `plus_NO` if given."""
        if not self._copied:
            out_NO = self._by_sources(x_NI)
            return out_NO if plus_NO is None else plus_NO + out_NO
        copy = self._copy
        if copy is None or copy.state != self._state():
            copy = self._copy = self._made()
        if not copy.weight.is_mkldnn:
            out_NO = F.linear(x_NI, copy.weight, copy.bias)
        elif plus_NO is not None and x_NI.dtype == torch.float32:
            return onednn.product_plus(x_NI, plus_NO, copy.weight, copy.bias)
        else:
            out_NO = onednn.product(x_NI, copy.weight, copy.bias)
        # In bfloat16 product and sum are rounded one after the other, as the model's own are.
        return out_NO if plus_NO is None else plus_NO + out_NO

    def check(self) -> None:
        """Compare all weights bit by bit with what was copied; a copy that differs is dropped."""
        copy = self._copy
        if copy is not None and (copy.state != self._state() or copy.sums != self._checksums()):
            self.drop()

    def drop(self) -> None:
        """Give the copy back; the next product makes it anew."""
        self._copy = None

    def _by_sources(self, x_NI: Tensor) -> Tensor:
        product = onednn.product if onednn.usable(x_NI.device, x_NI.dtype) else F.linear
        parts = [product(x_NI, linear.weight, linear.bias) for linear in self._linears]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _parameters(self) -> list[Tensor]:
        return [
            own
            for linear in self._linears
            for own in (linear.weight, linear.bias)
            if own is not None
        ]

    def _state(self) -> _State:
        return tuple((id(p), p.data_ptr(), p._version) for p in self._parameters())

    def _made(self) -> _Copy:
        weight = torch.cat([linear.weight.detach() for linear in self._linears])
        bias = None
        if self._has_bias:
            biases: list[Tensor] = [
                weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
                for linear in self._linears
            ]
            bias = torch.cat(biases).detach()
        if weight.numel() >= onednn.SMALL and onednn.usable(weight.device, weight.dtype):
            weight = onednn.laid_out(weight)
        held = [(p, p.detach()) for p in self._parameters()]
        return _Copy(self._state(), self._checksums(), held, weight, bias)

    def _checksums(self) -> list[int]:
        return [_checksum(p.detach()) for p in self._parameters()]


def _checksum(x: Tensor) -> int:
    """Of its bits as whole numbers, each row times an odd number of its own, so that any one edit
    changes it, and rows that change places do."""
    rows = x.contiguous().view(len(x), -1)
    width = rows[0].nbytes
    even = width % 8 == 0 and rows.data_ptr() % 8 == 0
    sums = rows.view(torch.int64 if even else _INTEGERS[x.element_size()]).sum(dim=1)
    return int((sums * torch.arange(1, 2 * len(sums), 2)).sum())
