"""Bookkeeping of a packed batch that loses visual tokens."""

from __future__ import annotations

import torch

from trio.pruning.batch import Ragged, compact, contiguous_positions


def test_two_stages_over_two_requests_and_three_images() -> None:
    ragged = Ragged.of_spans((10, 4, 8), [[(1, 4), (6, 9)], [], [(5, 8)]])
    assert ragged.kept(0) == [0, 1, 2, 3, 4, 5]
    first, index = compact(ragged, [[[0, 2], [1]], [], [None]])
    assert index.tolist() == [0, 1, 3, 4, 5, 7, 9, *range(10, 22)]
    assert first.lengths == (7, 4, 8)
    assert first.kept(0) == [0, 2, 4]
    assert [image.start for image in first.images[0]] == [1, 5]
    second, index = compact(first, [[[1], [0]], [], [[2]]])
    assert index.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18]
    assert second.lengths == (6, 4, 6)
    assert second.kept(0) == [2, 4]
    assert second.kept(2) == [2]
    assert second.visual_tokens(0) == 2


def test_starts_point_at_the_images_own_tokens() -> None:
    tokens = torch.arange(18)
    ragged = Ragged.of_spans((9, 9), [[(0, 3), (3, 6)], [(2, 9)]])
    kept = [[[1, 2], [0]], [[0, 3, 6]]]
    left, index = compact(ragged, kept)
    tokens = tokens[index]
    for start, images in zip(left.starts, left.images, strict=True):
        for image in images:
            first = start + image.start
            own = tokens[first : first + image.count].tolist()
            assert len(own) == len(image.tokens)
    assert tokens.tolist() == [1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 17]
    assert [image.start for image in left.images[0]] == [0, 2]
    assert [image.start for image in left.images[1]] == [2]


def test_positions_count_from_zero_in_each_request() -> None:
    got = contiguous_positions((3, 1, 2), torch.device("cpu"))
    assert got.tolist() == [0, 1, 2, 0, 0, 1]
