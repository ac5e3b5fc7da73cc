"""CDPruner's greedy inference against determinants, its relevance, and its ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny.tensors import random
from trio.pruning.methods.cdpruner import (
    cosines,
    determinantal,
    kernel_rows,
    relevance,
    unit_length,
)

quick = settings(max_examples=80, deadline=None)


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Relevance and features, with duplicates among these and of a rank often below N."""
    batch, tokens, size = (draw(st.integers(1, most)) for most in (3, 20, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = draw(st.integers(1, tokens))
    kind_N = torch.randint(kinds, (tokens,), generator=generator)
    features = torch.randn(batch, kinds, size, generator=generator)[:, kind_N]
    own = torch.rand(batch, kinds, generator=generator)[:, kind_N] + 0.05
    return own, features


def new_parts(kernel_NN: Tensor, chosen: list[int]) -> Tensor:
    """By what factor each token would raise the determinant of the chosen ones' kernel."""
    if not chosen:
        return kernel_NN.diagonal()
    rows_SN = kernel_NN[chosen]
    explained_SN = torch.linalg.solve(rows_SN[:, chosen], rows_SN)
    return kernel_NN.diagonal() - (rows_SN * explained_SN).sum(dim=0)


@quick
@given(tiles(), st.data())
def test_the_choice_raises_the_determinant_most(
    own: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """In float64; what is spanned by the chosen ones is filled up by index."""
    relevance_BN, features_BNC = own
    tokens = relevance_BN.shape[1]
    chosen = determinantal(relevance_BN, features_BNC, data.draw(st.integers(0, tokens)))
    for r_N, x_NC, order, gain in zip(
        relevance_BN.double(), features_BNC.double(), chosen.order_BK, chosen.gain_BK, strict=True
    ):
        unit_NC = x_NC / x_NC.norm(dim=1, keepdim=True)
        kernel_NN = r_N[:, None] * (unit_NC @ unit_NC.T) * r_N
        taken: list[int] = []
        left = list(range(tokens))
        for token, raised in zip(order.tolist(), gain.tolist(), strict=True):
            new_N = new_parts(kernel_NN, taken)
            share_N = new_N / kernel_NN.diagonal()
            clearly = [other for other in left if share_N[other] > 1e-3]
            if clearly:
                best = float(new_N[clearly].max())
                assert new_N[token] >= best * (1 - 1e-3)
                assert raised == pytest.approx(float(new_N[token]), rel=1e-2)
                twins = (kernel_NN - kernel_NN[token]).abs().amax(dim=1) < 1e-9
                assert token == min(other for other in left if twins[other])
            elif bool((share_N[left] < 1e-7).all()):
                assert token == left[0] and raised == 0
            left.remove(token)
            taken += [token] if raised > 0 else []


@quick
@given(tiles(), st.data())
def test_a_batch_is_its_tiles_one_by_one(own: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, own[0].shape[1]))
    both = determinantal(*own, keep)
    for tile, (relevance_N, features_NC) in enumerate(zip(*own, strict=True)):
        alone = determinantal(relevance_N[None], features_NC[None], keep)
        assert torch.equal(both.order_BK[tile], alone.order_BK[0])


def test_more_picks_than_the_rank() -> None:
    """The authors' code divides by the root of rounding here, and chooses some tokens twice."""
    features = random(1, 200, 8)
    chosen = determinantal(torch.ones(1, 200), features, 64)
    order, gain = chosen.order_BK[0].tolist(), chosen.gain_BK[0]
    assert len(set(order)) == 64
    assert (gain[:8] > 0).all() and not gain[8:].any()
    assert order[8:] == [token for token in range(200) if token not in order[:8]][:56]


def test_of_tokens_equal_but_for_rounding_the_first_is_taken() -> None:
    scale = 1 + torch.arange(120)[:, None] / 7
    features = (random(30, 48).repeat(4, 1) * scale)[None]
    assert determinantal(torch.ones(1, 120), features, 30).order_BK.max() < 30
    backwards = features.flip(1)
    assert determinantal(torch.ones(1, 120), backwards, 30).order_BK.max() < 30


def test_a_kernel_of_nothing_and_of_numbers_that_are_none() -> None:
    assert determinantal(torch.zeros(1, 5), random(1, 5, 4), 5).order_BK[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    features = random(1, 6, 8)
    features[0, 2] = torch.nan
    assert sorted(determinantal(torch.ones(1, 6), features, 6).order_BK[0].tolist()) == list(
        range(6)
    )
    with pytest.raises(ValueError, match="keep 7 of 6"):
        determinantal(torch.ones(1, 6), random(1, 6, 4), 7)


def test_relevance_is_unlikeness_scaled_over_all_tiles() -> None:
    patches, texts = random(2, 10, 6), random(3, 6, seed=1)
    unlike = -torch.nn.functional.cosine_similarity(
        patches[:, :, None], texts[None, None], dim=-1
    ).mean(dim=-1)
    got = relevance(patches, texts)
    assert torch.allclose(cosines(patches, texts).mean(dim=-1), -unlike, atol=1e-6)
    assert got.flatten().argsort().tolist() == unlike.flatten().argsort().tolist()
    assert got.max() == 1 and 0 < got.min() < 1e-5
    same = patches[:, :1].expand(-1, 10, -1)[:1]
    assert torch.allclose(relevance(same, texts), torch.ones(1, 10))


def test_half_precision_and_autocast_count_in_float32() -> None:
    patches, texts = random(1, 30, 16).bfloat16(), random(1, 16, seed=1).bfloat16()
    wide = patches.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = relevance(patches, texts)
        half = determinantal(own, patches, 12)
        rows = kernel_rows(own, unit_length(patches), torch.arange(3)[None])
    assert own.dtype == half.gain_BK.dtype == rows.dtype == torch.float32
    assert torch.equal(own, relevance(wide, texts.float()))
    full = determinantal(own, wide, 12)
    assert torch.equal(half.order_BK, full.order_BK)
    assert torch.equal(half.gain_BK, full.gain_BK)
