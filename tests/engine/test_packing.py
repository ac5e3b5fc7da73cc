"""Prompts whose images the encoder has reduced."""

import torch

from trio.engine.packing import Entry, entered
from trio.families.adapter import Features


def reduced(*sources: int | None) -> Features:
    return Features(torch.zeros(len(sources), 2), sources=sources)


def test_what_is_left_of_two_prompts() -> None:
    # Prompts of 9 and 7 tokens: images at 2..6 and 7..9 of the first, 1..5 of the second.
    entry = Entry.of(
        [9, 7],
        [[(2, 6), (7, 9)], [(1, 5)]],
        [[reduced(None, 1, 3), reduced(1)], [reduced(0, 2)]],
    )
    assert entry.lengths == (7, 5)
    assert entry.spans == (((2, 5), (6, 7)), ((1, 3),))
    assert entry.index_T.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10, 12, 14, 15]


def test_a_prompt_without_images_stays_whole() -> None:
    entry = Entry.of([3], [[]], [[]])
    assert (entry.lengths, entry.spans, entry.index_T.tolist()) == ((3,), ((),), [0, 1, 2])


def test_what_entered_is_numbered_over_all_images_of_a_prompt() -> None:
    assert entered([4, 2], [reduced(None, 1, 3), reduced(1)]) == [None, 1, 3, 5]
    assert entered([4], [Features(torch.zeros(4, 2))]) == []
