"""EADP's choice against a slow loop, its budgets, and what its importance depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trio.pruning import eadp
from trio.pruning.eadp import Settings, importance, select, select_by_tile, share_out, similarity


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(tokens: int, seed: int) -> Tensor:
    """As visual tokens are: many of a kind."""
    return random(7, 24, seed=seed).repeat(tokens // 7 + 1, 1)[:tokens] + 0.2 * random(tokens, 24)


def slowly(importance_N: Tensor, features_NC: Tensor, keep: int) -> list[int]:
    """Every gain summed in float64, in each round."""
    similar_NN = similarity(features_NC).double()
    best_N = torch.zeros(len(importance_N), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(keep):
        gain_N = ((similar_NN - best_N).clamp(min=0) * importance_N.double()).sum(dim=1)
        gain_N[chosen] = -1
        chosen.append(int(gain_N.argmax()))
        best_N = torch.maximum(best_N, similar_NN[chosen[-1]])
    return chosen


@pytest.mark.parametrize(("tokens", "keep"), [(5, 5), (40, 7), (100, 50), (196, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_a_loop(tokens: int, keep: int, seed: int) -> None:
    for features in (random(tokens, 24, seed=seed), clustered(tokens, seed)):
        own = weights(tokens, seed=seed)
        assert select(own, features, keep).tolist() == slowly(own, features, keep)


def test_a_batch_is_its_images_one_by_one() -> None:
    own, features = weights(3, 60), random(3, 60, 24)
    alone = [select(own[image], features[image], 20) for image in range(3)]
    assert torch.equal(select(own, features, 20), torch.stack(alone))


def test_all_gains_at_once_choose_the_same() -> None:
    """What other devices do."""
    own = weights(4, 90)
    features = torch.stack([clustered(90, seed) for seed in range(4)])
    chosen = eadp._all_at_once(own, similarity(features), 45)
    assert torch.equal(chosen, select(own, features, 45))


def test_of_equal_tokens_the_first_is_taken() -> None:
    features = torch.eye(4).repeat(5, 1)
    for chosen in (
        select(torch.ones(20), features, 20),
        eadp._all_at_once(torch.ones(1, 20), similarity(features[None]), 20)[0],
    ):
        assert chosen.tolist() == list(range(20))


def test_the_choice_does_not_depend_on_the_size_of_features() -> None:
    own, features = weights(50), random(50, 24)
    scale = 1 + weights(50, 1, seed=3)
    assert torch.equal(select(own, features, 9), select(own, features * scale, 9))


def test_none_kept_and_too_many() -> None:
    assert select(weights(6), random(6, 4), 0).tolist() == []
    with pytest.raises(ValueError, match="keep 7 of 6"):
        select(weights(6), random(6, 4), 7)
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


@pytest.mark.parametrize("seed", range(20))
def test_budgets_add_up(seed: int) -> None:
    sizes = [
        int(n) for n in torch.randint(1, 30, (5,), generator=torch.Generator().manual_seed(seed))
    ]
    own = weights(sum(sizes), seed=seed) ** 8
    for keep in range(sum(sizes) + 1):
        counts = share_out(own, sizes, keep)
        assert sum(counts) == keep
        assert all(0 <= n <= size for n, size in zip(counts, sizes, strict=True))


def test_tiles_are_chosen_from_one_by_one() -> None:
    sizes = [16, 25, 9]
    own, features = weights(50), random(50, 24)
    chosen = select_by_tile(own, features, sizes, 20)
    counts = share_out(own, sizes, 20)
    expected, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        part = slice(start, start + size)
        expected += [start + i for i in slowly(own[part], features[part], count)]
        start += size
    assert chosen.tolist() == expected


def test_padding_of_texts_does_not_count() -> None:
    patches, tokens, pooled = random(32, 8), random(2, 9, 8, seed=1), random(2, 8, seed=2)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    masked = importance(patches, tokens, pooled, [(4, 8)], mask_ML=mask)
    noise = torch.where(mask[..., None], tokens, 1e3)
    assert torch.equal(importance(patches, noise, pooled, [(4, 8)], mask_ML=mask), masked)
    traces = [eadp.Trace(), eadp.Trace()]
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
    patches, texts = random(50, 8), (random(1, 6, 8, seed=1), random(1, 8, seed=2))
    grids = [(5, 5), (5, 5)]
    both = eadp.Trace()
    importance(patches, *texts, grids, trace=both)
    for tile in range(2):
        alone = eadp.Trace()
        importance(patches[25 * tile : 25 * tile + 25], *texts, [(5, 5)], trace=alone)
        assert torch.equal(both.matches[tile][0].both_N, alone.matches[0][0].both_N)
    assert both.minmax_N.max() == 1
    image = importance(patches, *texts, grids, Settings(entropy_over="image"))
    assert not torch.allclose(image, importance(patches, *texts, grids), atol=1e-3)


def test_smoothing_stays_within_its_tile() -> None:
    patches, texts = random(41, 8), (random(1, 6, 8, seed=1), random(1, 8, seed=2))
    trace = eadp.Trace()
    importance(patches, *texts, [(4, 4), (5, 5)], trace=trace)
    for part, edge in ((slice(0, 16), 4), (slice(16, 41), 5)):
        values = trace.minmax_N[part].view(edge, edge)
        corner = values[[1, 0, 1]][:, [1, 0, 1]]  # reflected at the border
        bell = torch.tensor([-0.5, 0.0, -0.5]).exp()
        expected = (torch.outer(bell, bell) / bell.sum() ** 2 * corner).sum()
        assert torch.allclose(trace.smoothed_N[part][0], expected, atol=1e-6)


def test_half_precision_and_autocast_are_scored_in_float32() -> None:
    patches, texts = random(36, 8), (random(1, 6, 8, seed=1), random(1, 8, seed=2))
    features = random(36, 24, seed=3)
    plain = importance(patches, *texts, [(6, 6)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(importance(patches, *texts, [(6, 6)]), plain)
        assert torch.equal(similarity(features), similarity(features.clone()))
        assert similarity(features).dtype == torch.float32
    tokens, pooled = (text.bfloat16() for text in texts)
    half = importance(patches.bfloat16(), tokens, pooled, [(6, 6)])
    assert half.dtype == torch.float32 and len(half.unique()) == 36
