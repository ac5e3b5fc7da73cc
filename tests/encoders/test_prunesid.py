"""PruneSID's counts and choice against the loops of its definition; components, ends, precision."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny.tensors import random
from trio.encoders.prunesid import (
    Selection,
    by_class_token,
    by_component,
    components,
    counts,
    merged_budget,
)

quick = settings(max_examples=80, deadline=None)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of groups, and survivors of each."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any))
    return sizes, [draw(st.integers(1, size)) if size else 0 for size in sizes]


def counted(sizes: list[int], survivors: list[int], keep: int, class_tokens: int) -> list[int]:
    """Loop for loop; every one of them ends, as no more is asked than there is."""
    low = [min(1, size) for size in sizes]
    most = [min(5 * -(-keep // 64), size, own) for size, own in zip(sizes, survivors, strict=True)]
    while sum(most) < min(keep, sum(sizes)):
        most = [min(own + 1, size) for own, size in zip(most, sizes, strict=True)]
    rest = max(0, keep - sum(low) - class_tokens)
    kept, before, seen = [], 0, 0
    for group, own in enumerate(survivors):
        seen += own
        until = round(Fraction(rest * seen, sum(survivors)))  # halves to the even number
        kept.append(min(low[group] + until - before, most[group]))
        before = until
    missing = sum(low) + rest - sum(kept)
    for group in sorted(range(len(sizes)), key=lambda group: -survivors[group]):
        more = min(missing, most[group] - kept[group])
        kept[group] += more
        missing -= more
    return kept


@quick
@given(groups(), st.data(), st.integers(0, 1))
def test_counts_are_those_of_the_loops(
    own: tuple[list[int], list[int]], data: st.DataObject, class_tokens: int
) -> None:
    sizes, survivors = own
    keep = data.draw(st.integers(1, sum(sizes) + class_tokens))
    got = counts(np.array(sizes), np.array(survivors), keep, class_tokens)
    assert got.kept_Q.tolist() == counted(sizes, survivors, keep, class_tokens)
    assert (got.kept_Q <= got.most_Q).all() and (got.most_Q <= got.sizes_Q).all()
    one_each = sum(min(1, size) for size in sizes)
    assert got.kept_Q.sum() == max(one_each, keep - class_tokens)


def chosen_by_loops(patches_ND: Tensor, score_N: Tensor, own: Selection, first: int) -> list[int]:
    """From the groups, threshold and counts of a selection; `first` is the number of patch 0."""
    unit_ND = patches_ND / patches_ND.norm(dim=1, keepdim=True)
    kept: list[int] = []
    for group, count in enumerate(own.counts.kept_Q.tolist()):
        members = [i for i in range(len(unit_ND)) if own.group_N[i] == group]
        members.sort(key=lambda i: -float(score_N[i]))
        alive: list[int] = []
        for patch in members:
            if all(float(unit_ND[patch] @ unit_ND[other]) <= own.threshold for other in alive):
                alive.append(patch)
        dropped = [patch for patch in members if patch not in alive]
        assert [i for i in own.survivors_QR[group].tolist() if i >= 0] == alive
        kept += [patch + first for patch in (alive + dropped)[:count]]
    return kept


@quick
@given(st.integers(2, 60), st.integers(2, 12), st.integers(0, 2**32), st.data())
def test_the_choice_is_that_of_the_loops(
    patches: int, size: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(patches + 1, size, generator=generator) + 1
    attention = torch.rand(3, patches, generator=generator)
    keep = data.draw(st.integers(1, patches + 1))
    own = by_class_token(hidden, attention, keep)
    expected = [0, *chosen_by_loops(hidden[1:], attention.sum(dim=0), own, 1)]
    assert own.order_K.tolist() == expected[:keep] and len(own.order_K) == keep
    cosine = torch.nn.functional.cosine_similarity(hidden[1:, None], hidden[None, 1:], dim=-1)
    pairs = cosine[~torch.eye(patches, dtype=torch.bool)]
    assert own.threshold == pytest.approx(keep / 32 * float(pairs.mean()), abs=1e-4)

    keep = data.draw(st.integers(1, patches))
    own = by_component(hidden[1:], keep)
    most = own.components_NQ.amax(dim=1)
    expected = chosen_by_loops(hidden[1:], most, own, 0)
    assert own.order_K.tolist() == expected[:keep] and len(own.order_K) == keep
    mean = float((pairs.sum() / 2 + patches) / patches**2)
    assert own.threshold == pytest.approx(max(18 * keep / patches, 1) * mean, abs=1e-3)


def test_components_are_singular_vectors_and_draw_nothing() -> None:
    hidden = random(40, 24)
    wide = hidden.double().sigmoid()
    left, *_ = torch.linalg.svd(wide - wide.mean(dim=1, keepdim=True))
    before = torch.random.get_rng_state()
    got = components(hidden, 10)
    assert torch.allclose(got, left[:, :10].abs().float(), atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)
    # What the rank does not reach: 24 channels less their mean, and more than there are patches.
    assert not components(hidden, 40)[:, 23:].any()
    assert components(hidden[:3], 5).shape == (3, 5)
    assert not components(torch.ones(6, 4), 2).any()


def test_what_is_dropped_comes_behind_the_survivors() -> None:
    """All patches alike: every group has one survivor, and the rest by attention."""
    hidden, attention = torch.ones(17, 8), torch.arange(16.0)[None]
    own = by_class_token(hidden, attention, 9)
    assert own.threshold == pytest.approx(9 / 32)
    assert own.order_K.tolist() == [0, *range(16, 8, -1)]


def test_ends() -> None:
    hidden, attention = random(21, 8), random(2, 20, seed=1).softmax(dim=-1)
    assert by_class_token(hidden, attention, 1).order_K.tolist() == [0]
    assert sorted(by_class_token(hidden, attention, 21).order_K.tolist()) == list(range(21))
    assert sorted(by_component(hidden, 21).order_K.tolist()) == list(range(21))
    assert len(by_component(hidden, 1).order_K) == 1
    for keep in (0, 22):
        with pytest.raises(ValueError, match=f"keep {keep} of 21"):
            by_class_token(hidden, attention, keep)
    hidden[4] = torch.nan
    assert len(set(by_class_token(hidden, attention, 12).order_K.tolist())) == 12
    assert [merged_budget(tokens, 64) for tokens in (9, 16, 17, 576, 1296)] == [9, 16, 16, 64, 144]


def test_half_precision_and_autocast_count_in_float32() -> None:
    hidden, attention = random(41, 16).bfloat16(), random(2, 40, seed=1).softmax(-1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = by_class_token(hidden, attention, 16)
    wide = by_class_token(hidden.float(), attention.float(), 16)
    assert torch.equal(half.order_K, wide.order_K) and half.threshold == wide.threshold
