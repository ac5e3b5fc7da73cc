"""The decode kernel in Triton's interpreter against SDPA over rectangles with a mask, which lie in
no pages. Run as a program: the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import random
import sys

import torch

from trio.decoder import paged_kernel
from trio.decoder.attention import Padded, Paged, _paged_kernel

PAGE = 16


def check(case: int, dtype: torch.dtype) -> None:
    chance, generator = random.Random(case), torch.Generator().manual_seed(case)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    paged_kernel._PROGRAMS = chance.choice((1, 20))  # whether rows are divided
    rows, kv_heads = chance.choice((1, 3)), chance.choice((1, 2))
    group, dim = chance.choice((1, 1, 2, 3, 7)), chance.choice((8, 16, 40, 64))
    longest = chance.choice((1, PAGE, 70, 150, 300))
    lengths = [chance.choice((longest, chance.randint(1, longest))) for _ in range(rows)]
    rectangle = normal(2, rows, kv_heads, longest, dim)
    width = -(-longest // PAGE) + chance.randint(0, 2)
    order = torch.randperm(rows * width, generator=generator).int() + 1
    table_BW = order.view(rows, width)
    pool = torch.full((2, rows * width + 1, PAGE, kv_heads, dim), torch.nan, dtype=dtype)
    for row, length in enumerate(lengths):
        for token in range(length):
            place = int(table_BW[row, token // PAGE]), token % PAGE
            pool[:, place[0], place[1]] = rectangle[:, row, :, token]
    # As a padded step has them: rows without keys, whose table leads to nobody's page.
    table_BW = torch.cat([table_BW, torch.zeros(2, width, dtype=torch.int32)])
    query = normal(1, rows + 2, kv_heads * group, dim).transpose(1, 2)
    paged = Paged(table_BW, torch.tensor([*lengths, 0, 0]))
    scale = chance.choice((dim**-0.5, 0.3))
    got = paged.attend(query, pool[0], pool[1], scale)
    assert got.shape == (1, rows + 2, kv_heads * group, dim) and not got[:, rows:].any()
    expected = Padded(torch.tensor(lengths)).attend(
        query[:, :, :rows].float(), rectangle[0].float(), rectangle[1].float(), scale
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # 2 steps of bfloat16 at 1
    difference = float((got[:, :rows].float() - expected).abs().max())
    assert difference < tolerance, (case, dtype, difference)


def main(cases: int) -> None:
    kernel = _paged_kernel(torch.device("cpu"), torch.float32, (4, PAGE, 2, 8))
    assert kernel is paged_kernel.attend_pages
    for number in range(cases):
        check(number, torch.bfloat16 if number % 3 == 2 else torch.float32)


if __name__ == "__main__":
    main(int(sys.argv[1]))
