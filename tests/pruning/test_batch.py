"""Bookkeeping of a packed batch that loses visual tokens."""

from __future__ import annotations

import pytest
import torch

from trio.pruning.batch import (
    Ragged,
    compact,
    contiguous_positions,
    finite_groups,
    finite_rows,
    nothing_if_finite,
)


def test_two_stages_over_two_requests_and_three_images() -> None:
    ragged = Ragged.of_spans((10, 4, 8), [[(1, 4), (6, 9)], [], [(5, 8)]])
    assert ragged.visual().tolist() == [1, 2, 3, 6, 7, 8, 19, 20, 21]
    first, index = compact(ragged, {(0, 0): 2, (0, 1): 1}, torch.tensor([[0, 2], [1, 3]]))
    assert index.tolist() == [0, 1, 3, 4, 5, 7, 9, *range(10, 22)]
    assert first.lengths == (7, 4, 8)
    assert first.visual(0).tolist() == [1, 2, 5]
    assert [image.span for image in first.images[0]] == [(1, 3), (5, 6)]
    second, index = compact(first, {(0, 0): 1, (0, 1): 1, (2, 0): 1}, torch.tensor([[1], [0], [2]]))
    assert index.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18]
    assert second.lengths == (6, 4, 6)
    assert second.visual(0).tolist() == [1, 4]
    assert second.visual().tolist() == [1, 4, 15]
    assert second.visual_tokens(0) == 2


def test_starts_point_at_the_images_own_tokens() -> None:
    tokens = torch.arange(18)
    ragged = Ragged.of_spans((9, 9), [[(0, 3), (3, 6)], [(2, 9)]])
    kept_NK = torch.tensor([[1, 2, 3], [0, 3, 3], [0, 3, 6]])
    left, index = compact(ragged, {(0, 0): 2, (0, 1): 1, (1, 0): 3}, kept_NK)
    tokens = tokens[index]
    assert tokens.tolist() == [1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 17]
    assert tokens[left.visual()].tolist() == [1, 2, 3, 11, 14, 17]
    assert left.request_T().tolist() == [0] * 6 + [1] * 5
    assert [image.start for image in left.images[0]] == [0, 2]
    assert [image.start for image in left.images[1]] == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_told_by_group(dtype: torch.dtype) -> None:
    rows = torch.full((6, 8), torch.finfo(dtype).max, dtype=dtype)
    rows[:, ::2] *= -1
    rows[2, 3], rows[4, 7] = torch.nan, -torch.inf
    assert finite_rows(rows).tolist() == [True, True, False, True, False, True]
    group = torch.tensor([0, 0, 1, 2, 2, 3])
    assert finite_groups(nothing_if_finite(rows), group, 4).tolist() == [True, False, False, True]


def test_positions_count_from_zero_in_each_request() -> None:
    got = contiguous_positions((3, 1, 2), torch.device("cpu"))
    assert got.tolist() == [0, 1, 2, 0, 0, 1]
