"""EADP's importance, what it depends on, and the budgets of tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny.tensors import random
from trio.pruning.scores import relevance
from trio.pruning.scores.relevance import (
    FRAMES,
    LANGUAGE,
    Settings,
    importance,
    instruction,
    select,
    select_by_tile,
    share_down,
    share_out,
    tile_shares,
)
from trio.pruning.selection.coverage import cover

quick = settings(max_examples=60, deadline=None)


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def texts() -> tuple[Tensor, Tensor]:
    return random(1, 6, 8, seed=1), random(1, 8, seed=2)


def test_an_image_is_chosen_from_as_a_batch_of_one() -> None:
    own, features = weights(50), random(50, 24)
    chosen = select(own, features, 9)
    expected = cover(features[None], 9, importance_BN=own[None]).order_BK[0]
    assert torch.equal(chosen, expected)
    with pytest.raises(ValueError, match="keep 7 of 6"):
        share_out(weights(6), [2, 4], 7)


@pytest.mark.parametrize(
    ("tiles", "sizes", "keep", "counts"),
    [
        ([1.0, 1.0, 2.0], [8, 8, 8], 8, [2, 2, 4]),
        ([1.0, 1.0, 1.0], [8, 8, 8], 8, [3, 3, 2]),  # of equal remainders the first
        ([7.0, 1.0, 1.0], [4, 8, 8], 12, [4, 4, 4]),  # no room for 9.3
        ([90.0, 9.0, 1.0], [4, 8, 8], 15, [4, 8, 3]),  # nor, then, for 9.9
        ([0.0, 0.0], [4, 4], 3, [2, 1]),
        ([1.0, 0.0], [4, 4], 6, [4, 2]),
        ([1.0, 2.0], [4, 8], 12, [4, 8]),
        ([1.0, 2.0], [4, 8], 0, [0, 0]),
    ],
)
def test_the_budget_by_tile(
    tiles: list[float], sizes: list[int], keep: int, counts: list[int]
) -> None:
    own = torch.cat([torch.full((n,), w / n) for w, n in zip(tiles, sizes, strict=True)])
    assert share_out(own, sizes, keep) == counts


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_budgets(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Ours add up; the public code's are the shares rounded down, but 1 at least."""
    keep, own = data.draw(st.integers(0, sum(sizes))), weights(sum(sizes), seed=seed) ** 8
    counts = share_out(own, sizes, keep)
    assert sum(counts) == keep
    assert all(0 <= n <= size for n, size in zip(counts, sizes, strict=True))
    shares = tile_shares(own, sizes, keep)
    whole = float(own.sum())
    assert float(shares.sum()) == pytest.approx(keep * whole / (whole + 1e-6), rel=1e-3)
    expected = shares.floor().clamp(min=1).minimum(torch.tensor(sizes))
    assert share_down(own, sizes, keep) == expected.tolist()


def test_a_tile_whose_importance_is_no_number_gets_a_share_all_the_same() -> None:
    """The image is reported elsewhere, and must not end a batch."""
    own = torch.ones(8)
    own[2] = torch.nan
    assert share_out(own, [4, 4], 5) == [1, 4]
    assert share_down(own, [4, 4], 5) == [1, 3]


@pytest.mark.parametrize("share", [share_out, share_down])
def test_tiles_are_chosen_from_one_by_one(share: relevance.Share) -> None:
    sizes = [16, 25, 9]
    own, features = weights(50), random(50, 24)
    chosen = select_by_tile(own, features, sizes, 20, share)
    parts = zip(own.split(sizes), features.split(sizes), share(own, sizes, 20), strict=True)
    alone = [select(own_N, own_NC, count) for own_N, own_NC, count in parts]
    starts = zip(alone, (0, 16, 41), strict=True)
    assert chosen.tolist() == torch.cat([order + start for order, start in starts]).tolist()
    assert len(chosen) == (20 if share is share_out else sum(share_down(own, sizes, 20)))


def test_padding_of_texts_does_not_count() -> None:
    patches, tokens, pooled = random(32, 8), random(2, 9, 8, seed=1), random(2, 8, seed=2)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    masked = importance(patches, tokens, pooled, [(4, 8)], mask_ML=mask)
    noise = torch.where(mask[..., None], tokens, 1e3)
    assert torch.equal(importance(patches, noise, pooled, [(4, 8)], mask_ML=mask), masked)
    traces = [relevance.Trace(), relevance.Trace()]
    importance(patches, tokens[1:, :4], pooled[1:], [(4, 8)], trace=traces[0])
    importance(patches, tokens, pooled, [(4, 8)], mask_ML=mask, trace=traces[1])
    assert torch.equal(traces[0].matches[0][0].both_N, traces[1].matches[0][1].both_N)


def test_a_text_without_tokens_counts_as_a_whole() -> None:
    patches, pooled = random(30, 8), random(1, 8, seed=2)
    none = torch.zeros(1, 3, dtype=torch.bool)
    alone = importance(patches, random(1, 3, 8), pooled, None, mask_ML=none)
    whole = Settings(alpha=1.0)
    expected = importance(patches, random(1, 3, 8), pooled, None, whole)
    assert torch.allclose(alone, expected, atol=1e-5)


def test_entropy_goes_over_tiles_or_the_image() -> None:
    """Scaling is by image either way."""
    patches = random(50, 8)
    grids = [(5, 5), (5, 5)]
    both = relevance.Trace()
    importance(patches, *texts(), grids, trace=both)
    for tile in range(2):
        alone = relevance.Trace()
        importance(patches[25 * tile : 25 * tile + 25], *texts(), [(5, 5)], trace=alone)
        assert torch.equal(both.matches[tile][0].both_N, alone.matches[0][0].both_N)
    assert both.minmax_N.max() == 1
    image = importance(patches, *texts(), grids, Settings(entropy_over="image"))
    assert not torch.allclose(image, importance(patches, *texts(), grids), atol=1e-3)


def test_smoothing_stays_within_its_tile() -> None:
    patches = random(41, 8)
    trace = relevance.Trace()
    importance(patches, *texts(), [(4, 4), (5, 5)], trace=trace)
    for part, edge in ((slice(0, 16), 4), (slice(16, 41), 5)):
        values = trace.minmax_N[part].view(edge, edge)
        corner = values[[1, 0, 1]][:, [1, 0, 1]]  # reflected at the border
        bell = torch.tensor([-0.5, 0.0, -0.5]).exp()
        expected = (torch.outer(bell, bell) / bell.sum() ** 2 * corner).sum()
        assert torch.allclose(trace.smoothed_N[part][0], expected, atol=1e-6)


def test_scaling_goes_over_tiles_or_the_image() -> None:
    patches, grids = random(50, 8), [(5, 5), (5, 5)]
    by_tile, by_image = relevance.Trace(), relevance.Trace()
    importance(patches, *texts(), grids, Settings(scaled_over="tile"), trace=by_tile)
    importance(patches, *texts(), grids, Settings(scaled_over="image"), trace=by_image)
    assert torch.equal(by_tile.text_N, by_image.text_N)
    tiles = by_tile.minmax_N.split(25)
    assert [float(tile.max()) for tile in tiles] == [1, 1]
    assert all(0 < float(tile.min()) < 1e-4 for tile in tiles)
    assert min(float(tile.max()) for tile in by_image.minmax_N.split(25)) < 1


def test_frames_are_smoothed_one_by_one_or_not_at_all() -> None:
    """And a single row never is: there is nothing to reflect."""
    patches, frames = random(40, 8), [(4, 5), (4, 5)]
    ours, skipped, row = (relevance.Trace() for _ in range(3))
    importance(patches, *texts(), frames, Settings(entropy_over="image"), trace=ours)
    settings = Settings(entropy_over="image", smoothed="single")
    importance(patches, *texts(), frames, settings, trace=skipped)
    assert torch.equal(ours.minmax_N, skipped.minmax_N)
    assert torch.equal(skipped.smoothed_N, skipped.minmax_N)
    for frame in range(2):
        part = slice(20 * frame, 20 * frame + 20)
        alone = relevance._smoothed(ours.minmax_N[part], [(4, 5)], settings)
        assert torch.allclose(ours.smoothed_N[part], alone)
        assert not torch.allclose(alone, ours.minmax_N[part], atol=1e-3)
    importance(patches, *texts(), [(1, 40)], trace=row)
    assert torch.equal(row.smoothed_N, row.minmax_N)


def test_weights_by_patch_lean_on_the_text_token_that_it_is_least_like() -> None:
    patches, (tokens, pooled) = random(30, 8), texts()
    trace = relevance.Trace()
    importance(patches, tokens, pooled, [(5, 6)], FRAMES, trace=trace)
    ((match,),) = trace.matches
    assert len(match.kept_R) == 3  # half of six
    for patch in range(30):
        cosines = match.dense_NL[patch, match.kept_R]
        scores = [
            float(cosine) / (0.01 * (float(match.entropy_L[token]) + 1e-6))
            for cosine, token in zip(cosines, match.kept_R, strict=True)
        ]
        weight = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
        assert float(match.dense_N[patch]) == pytest.approx(
            float(weight @ cosines.double()), abs=1e-5
        )


def test_an_instruction_in_the_language_model_s_space() -> None:
    embeds = random(5, 8) * torch.arange(1, 6)[:, None]
    tokens, pooled = instruction(embeds.bfloat16())
    assert tokens.dtype == pooled.dtype == torch.float32
    assert torch.allclose(pooled[0], embeds.bfloat16().float().mean(dim=0))
    with pytest.raises(ValueError, match="without tokens"):
        instruction(embeds[:0])
    # Of one token, it is the text as a whole, and alpha has no effect.
    one = instruction(embeds[:1])
    plain, whole = (
        importance(random(20, 8), *one, [(4, 5)], Settings(alpha=alpha)) for alpha in (0.2, 1.0)
    )
    assert torch.allclose(plain, whole, atol=1e-5)
    assert torch.allclose(importance(random(20, 8), *one, [(4, 5)], LANGUAGE), whole**2, atol=1e-5)


def test_half_precision_and_autocast_are_scored_in_float32() -> None:
    patches = random(36, 8)
    plain = importance(patches, *texts(), [(6, 6)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(importance(patches, *texts(), [(6, 6)]), plain)
    tokens, pooled = (text.bfloat16() for text in texts())
    half = importance(patches.bfloat16(), tokens, pooled, [(6, 6)])
    assert half.dtype == torch.float32 and len(half.unique()) == 36
