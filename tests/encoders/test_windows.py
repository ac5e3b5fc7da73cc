"""Windows of an image and the choice within them, against loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.encoders.scan import scanned, windows

quick = settings(max_examples=60, deadline=None)


def by_score(scores: Sequence[float], tokens: Sequence[int]) -> list[int]:
    return sorted(tokens, key=lambda token: (-scores[token], token))


def looped(scores: Sequence[float], members: list[list[int]], keep: int) -> list[int]:
    """By the definition: an equal quota, and what is left over to the best tokens left."""

    def filled(quota: int) -> int:
        return sum(min(quota, len(own)) for own in members)

    quota = max(q for q in range(len(scores) + 1) if filled(q) <= keep)
    ranked = [by_score(scores, own) for own in members]
    taken = [token for own in ranked for token in own[:quota]]
    left = by_score(scores, [own[quota] for own in ranked if len(own) > quota])
    return sorted([*taken, *left[: keep - len(taken)]])


def members_of(rows: int, columns: int, edge: int) -> list[list[int]]:
    return [
        [
            row * columns + column
            for row in range(top, min(top + edge, rows))
            for column in range(left, min(left + edge, columns))
        ]
        for top in range(0, rows, edge)
        for left in range(0, columns, edge)
    ]


@quick
@given(st.integers(1, 14), st.integers(1, 20), st.integers(1, 6))
def test_windows_are_those_of_a_loop(rows: int, columns: int, edge: int) -> None:
    window = windows(rows * columns, columns, edge)
    found = [(window == number).nonzero().flatten().tolist() for number in window.unique()]
    assert found == members_of(rows, columns, edge)


@quick
@given(st.integers(1, 14), st.integers(1, 20), st.integers(1, 6), st.floats(0, 1), st.booleans())
def test_choice_equals_a_loop(rows: int, columns: int, edge: int, share: float, ties: bool) -> None:
    count = rows * columns
    keep = round(share * count)
    shallow, deep = torch.rand(2, count, generator=torch.Generator().manual_seed(count))
    if ties:
        shallow, deep = (shallow * 3).floor(), (deep * 3).floor()
    local = looped(shallow.tolist(), members_of(rows, columns, edge), keep // 2)
    left = [token for token in range(count) if token not in local]
    wanted = sorted([*local, *by_score(deep.tolist(), left)[: keep - len(local)]])
    kept = scanned(shallow[None], deep[None], [keep], columns, edge)
    assert kept[0].nonzero().flatten().tolist() == wanted


def test_a_window_with_all_of_the_attention_does_not_take_all() -> None:
    attention = torch.zeros(8, 8)
    attention[:4, :4] = 1 + torch.arange(16).view(4, 4)
    kept = scanned(attention.view(1, -1), -attention.view(1, -1), [20], 8, 4)
    assert int(kept.view(8, 8)[:4, :4].sum()) == 3
