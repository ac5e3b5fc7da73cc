"""Greedy coverage against a slow loop, on CPU and as other devices do it; ties, ends, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny.tensors import random
from trio.encoders.scope import saliency, scope
from trio.pruning.selection import coverage
from trio.pruning.selection.coverage import Combined, Coverage, cover, similarity

quick = settings(max_examples=60, deadline=None)


@st.composite
def images(draw: st.DrawFn) -> dict[str, Tensor]:
    """Features with duplicates among them, importance and saliency; B and N from 1."""
    batch, tokens, size = (draw(st.integers(1, most)) for most in (3, 60, 6))
    seed, kinds = draw(st.integers(0, 2**32)), draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(seed)
    kind_N = torch.randint(kinds, (tokens,), generator=generator)
    features = torch.randn(batch, kinds, size, generator=generator)[:, kind_N]
    importance, by = torch.rand(2, batch, tokens, generator=generator)
    return {"features": features, "importance": importance, "saliency": by}


def check_greedy(
    order_K: Tensor,
    gain_K: Tensor,
    similar_NN: Tensor,
    importance_N: Tensor,
    saliency_N: Tensor,
    combined: Combined,
) -> None:
    """Every gain in every round, in float64."""
    similar, weights, by = similar_NN.double(), importance_N.double(), saliency_N.double()
    best_N, left = torch.zeros_like(weights), list(range(len(weights)))
    for choice, gain in zip(order_K.tolist(), gain_K.tolist(), strict=True):
        covered = ((similar - best_N).clamp(min=0) * weights).sum(dim=1)
        gains = covered + by if combined == "sum" else covered * by
        assert gains[choice] == pytest.approx(gain, abs=1e-5)
        assert gains[choice] >= gains[left].max() - 1e-5  # and so it is one of those left
        same = (similar == similar[choice]).all(dim=1) & (by == by[choice])
        assert choice == min(token for token in left if same[token])
        left.remove(choice)
        best_N = torch.maximum(best_N, similar[choice])


@quick
@given(
    images(),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["product", "sum"]),
)
def test_the_choice_is_that_of_a_loop(
    own: dict[str, Tensor],
    data: st.DataObject,
    shifted: bool,
    weighted: bool,
    salient: bool,
    combined: Combined,
) -> None:
    features = own["features"]
    batch, tokens, _ = features.shape
    keep = data.draw(st.integers(0, tokens))
    ones = torch.ones(batch, tokens)
    chosen = cover(
        features,
        keep,
        importance_BN=own["importance"] if weighted else None,
        saliency_BN=own["saliency"] if salient else None,
        combined=combined,
        shifted=shifted,
    )
    combined = combined if salient else "product"
    weights = (
        own["importance"] if weighted else ones,
        own["saliency"] if salient else ones,
    )
    # What other devices do.
    similar = similarity(features, shifted=shifted)
    elsewhere = coverage._all_at_once(similar, keep, *weights, combined)
    for result in (chosen, elsewhere):
        for image in range(batch):
            alone = similarity(features[image], shifted=shifted)
            rows = (result.order_BK, result.gain_BK, *weights)
            order, gain, importance, by = (part[image] for part in rows)
            check_greedy(order, gain, alone, importance, by, combined)


@quick
@given(images(), st.data())
def test_a_batch_is_its_images_one_by_one(own: dict[str, Tensor], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, own["features"].shape[1]))

    def chosen(image: slice) -> Coverage:
        features, importance, by = (part[image] for part in own.values())
        return cover(features, keep, importance_BN=importance, saliency_BN=by)

    both = chosen(slice(None))
    for image in range(len(own["features"])):
        alone = chosen(slice(image, image + 1))
        assert torch.equal(both.order_BK[image], alone.order_BK[0])
        assert torch.equal(both.gain_BK[image], alone.gain_BK[0])


def test_of_equal_tokens_the_first_is_taken() -> None:
    """Also when all is covered and every gain is 0; lengths do not matter, nor does rounding."""
    features = random(4, 48).repeat(20, 1) * (1 + torch.arange(80)[:, None] / 7)
    similar = similarity(features[None], shifted=False)
    ones = torch.ones(1, 80)
    for chosen in (
        cover(features[None], 80, shifted=False),
        coverage._all_at_once(similar, 80, ones, ones, "product"),
    ):
        assert sorted(chosen.order_BK[0, :4].tolist()) == [0, 1, 2, 3]
        assert chosen.order_BK[0, 4:].tolist() == list(range(4, 80))
        assert not chosen.gain_BK[0, 4:].any()


def test_similarity_is_the_cosine() -> None:
    """Also of tokens that are the same, and of zeros, which resemble nothing."""
    features = random(2, 12, 5)
    features[:, 7], features[:, 9] = 3 * features[:, 2], 0
    cosine = torch.nn.functional.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    assert torch.allclose(similarity(features, shifted=False), cosine, atol=1e-6)
    assert torch.allclose(similarity(features[0]), (cosine[0] + 1) / 2, atol=1e-6)


def test_a_number_that_is_none_lets_no_token_be_taken_twice() -> None:
    features = random(1, 9, 4)
    features[0, 3] = torch.nan
    weights = torch.ones(1, 9)
    for chosen in (
        cover(features, 9),
        coverage._all_at_once(similarity(features), 9, weights, weights, "product"),
    ):
        assert sorted(chosen.order_BK[0].tolist()) == list(range(9))


def test_none_at_all_and_more_than_there_are() -> None:
    assert cover(random(2, 0, 4), 0).order_BK.shape == (2, 0)
    with pytest.raises(ValueError, match="keep 7 of 6"):
        cover(random(1, 6, 4), 7)


def test_half_precision_and_autocast_count_in_float32() -> None:
    features = random(1, 40, 16)
    plain = similarity(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(features), plain)
    half = cover(features.bfloat16(), 12, importance_BN=torch.ones(1, 40, dtype=torch.bfloat16))
    wide = cover(features.bfloat16().float(), 12)
    assert torch.equal(half.order_BK, wide.order_BK) and half.gain_BK.dtype == torch.float32


def test_scope_drops_the_class_token_and_counts_it_in_indices() -> None:
    hidden, attention = random(2, 26, 8), random(2, 4, 25, seed=1).softmax(dim=-1)
    assert torch.allclose(saliency(attention, 2.0), attention.sum(dim=1) ** 2)
    chosen = scope(hidden, attention, 7, alpha=2.0, combined="sum")
    expected = cover(
        hidden[:, 1:],
        7,
        saliency_BN=attention.sum(dim=1) ** 2,
        combined="sum",
        shifted=False,
    )
    assert torch.equal(chosen.order_BK, expected.order_BK + 1)
    assert chosen.order_BK.min() > 0
    salient = torch.zeros(1, 1, 25)
    salient[0, 0, 17] = 1  # a patch without attention gains nothing
    assert scope(hidden[:1], salient, 2).order_BK[0].tolist() == [18, 1]
