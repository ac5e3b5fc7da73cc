"""VisionZip, the scan and merging against loops over single tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trio.encoders.merging import merged, shared
from trio.encoders.reduction import CLASS_TOKEN, Reduced
from trio.encoders.scan import scan
from trio.encoders.visionzip import contextual_groups, visionzip, zip_split

HIDDEN, HEAD = 10, 6


@dataclass(frozen=True, slots=True)
class Tower:
    """Random images of one size as a tower leaves them."""

    shallow: Tensor
    deep: Tensor
    keys: Tensor
    hidden: Tensor
    valid: Tensor

    @classmethod
    def of(cls, images: int, patches: int, *, seed: int = 0, padded: bool = False) -> Tower:
        chance = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=chance)

        valid = torch.rand(images, patches, generator=chance) < (0.6 if padded else 2.0)
        return cls(
            normal(images, patches).exp(),
            normal(images, patches).exp(),
            normal(images, patches + 1, HEAD),
            normal(images, patches + 1, HIDDEN),
            valid,
        )

    def left(self, image: int) -> list[int]:
        return self.valid[image].nonzero()[:, 0].tolist()

    def zipped(self, keeps: list[int]) -> Reduced:
        dominant, contextual = zip(*map(zip_split, keeps), strict=True)
        return visionzip(self.deep, self.keys, self.hidden, dominant, contextual, self.valid)

    def scanned(self, keeps: list[int], columns: int, *, with_class: bool = False) -> Reduced:
        maps = (self.shallow, self.deep, self.hidden)
        return scan(*maps, keeps, columns, with_class=with_class, valid_IP=self.valid)


def highest(scores: Tensor, among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda patch: (-float(scores[patch]), patch))[:count]


def nearest(vectors: Tensor, patch: int, targets: list[int]) -> int:
    """Which of the targets, as a place among them."""
    cosines = [
        float(torch.cosine_similarity(vectors[patch].double(), vectors[t].double(), dim=0))
        for t in targets
    ]
    return cosines.index(max(cosines))


def naive_zip(tower: Tower, image: int, dominant: int, contextual: int) -> tuple[list[int], Tensor]:
    hidden, keys = tower.hidden[image, 1:], tower.keys[image, 1:]
    kept = sorted(highest(tower.deep[image], tower.left(image), dominant - 1))
    rest = [patch for patch in tower.left(image) if patch not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    groups: list[list[int]] = [[] for _ in targets]
    for patch in rest:
        if patch not in targets and targets:
            groups[nearest(keys, patch, targets)].append(patch)
    tokens = [tower.hidden[image, 0], *hidden[kept]]
    for target, group in zip(targets, groups, strict=True):
        mean = hidden[group].mean(dim=0) if group else torch.zeros(HIDDEN)
        tokens.append(hidden[target] + mean)
    return [CLASS_TOKEN, *kept, *targets], torch.stack(tokens)


def naive_scan(
    tower: Tower, image: int, keep: int, columns: int, *, with_class: bool
) -> tuple[list[int], Tensor]:
    hidden = tower.hidden[image, 1:]
    class_stays = with_class and keep > 1
    keep -= class_stays
    windows: dict[tuple[int, int], list[int]] = {}
    for patch in tower.left(image):
        windows.setdefault((patch // columns // 6, patch % columns // 6), []).append(patch)
    ranked = [highest(tower.shallow[image], own, len(own)) for own in windows.values()]
    kept: list[int] = []
    rank = 0
    while len(kept) < keep // 2:
        candidates = [own[rank] for own in ranked if rank < len(own)]
        kept += highest(tower.shallow[image], candidates, keep // 2 - len(kept))
        rank += 1
    left = [patch for patch in tower.left(image) if patch not in kept]
    kept = sorted(kept + highest(tower.deep[image], left, keep - len(kept)))
    groups = [[patch] for patch in kept]
    for patch in tower.left(image):
        if patch not in kept:
            groups[nearest(hidden, patch, kept)].append(patch)
    means = [hidden[group].mean(dim=0) for group in groups]
    first = [tower.hidden[image, 0]] if class_stays else []
    return [CLASS_TOKEN] * class_stays + kept, torch.stack([*first, *means])


def assert_equal(got: Reduced, expected: list[tuple[list[int], Tensor]]) -> None:
    assert got.lengths == tuple(len(sources) for sources, _ in expected)
    assert got.sources_T.tolist() == [source for sources, _ in expected for source in sources]
    tokens = torch.cat([tokens for _, tokens in expected])
    torch.testing.assert_close(got.tokens_TD, tokens, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("grid", "padded"), [((12, 12), False), ((7, 7), True), ((1, 3), False), ((13, 4), True)]
)
def test_as_loops_over_tokens_for_any_number_of_tokens(grid: tuple[int, int], padded: bool) -> None:
    rows, columns = grid
    tower = Tower.of(5, rows * columns, seed=rows, padded=padded)
    tower.valid[:, 0] = True
    most = [len(tower.left(image)) for image in range(5)]
    for keeps in ([1] * 5, most, [(i + 2) * n // 7 or 1 for i, n in enumerate(most)]):
        zipped = [naive_zip(tower, i, *zip_split(keep)) for i, keep in enumerate(keeps)]
        assert_equal(tower.zipped(keeps), zipped)
        for with_class in (False, True):
            scanned = [
                naive_scan(tower, i, keep, columns, with_class=with_class)
                for i, keep in enumerate(keeps)
            ]
            assert_equal(tower.scanned(keeps, columns, with_class=with_class), scanned)


def test_of_equal_attention_the_lower_index_stays() -> None:
    tower = Tower.of(1, 144)
    tower.shallow.fill_(1.0)
    tower.deep.fill_(1.0)
    assert tower.zipped([10]).sources_T.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 75]
    # Twice the best of four windows, and then the first of what is left.
    corners = [0, 1, 6, 7, 72, 73, 78, 79]
    assert tower.scanned([16], 12).sources_T.tolist() == sorted(
        [*corners, 2, 3, 4, 5, 8, 9, 10, 11]
    )


def test_equal_tokens_are_merged_into_the_first_of_them() -> None:
    hidden = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [4.0, 0.0]])
    kept = torch.tensor([1, 2, 4])
    expected = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
    torch.testing.assert_close(merged(hidden, kept), expected)


def test_windows_share_alike_and_small_ones_run_out() -> None:
    tower = Tower.of(2, 14 * 14, seed=3)
    window = [(p // 14 // 6, p % 14 // 6) for p in range(14 * 14)]
    tower.deep.copy_(torch.arange(14 * 14.0).flip(0))
    got = tower.scanned([2 * 45, 2 * 50], 14)
    for sources, share in zip(got.sources_T.split(got.lengths), (5, 5), strict=True):
        kept = Counter(window[patch] for patch in sources.tolist())
        assert len(kept) == 9
        # That at the edge has four patches; the other eight have one more to make up for it.
        assert min(kept.values()) == 4 and kept[2, 2] == 4 < share <= kept[0, 0]


def test_images_do_not_depend_on_the_batch() -> None:
    tower = Tower.of(6, 49, seed=5, padded=True)
    keeps = [3, 9, 1, 14, 5, 8]
    for got in (tower.zipped(keeps), tower.scanned(keeps, 7)):
        assert got.lengths == tuple(keeps)
    for image, keep in enumerate(keeps):
        one = slice(image, image + 1)
        parts = (tower.shallow, tower.deep, tower.keys, tower.hidden, tower.valid)
        alone = Tower(*(part[one] for part in parts))
        pairs = (
            (tower.zipped(keeps), alone.zipped([keep])),
            (tower.scanned(keeps, 7), alone.scanned([keep], 7)),
        )
        for batch, single in pairs:
            own = batch.sources_T.split(batch.lengths)[image]
            assert own.tolist() == single.sources_T.tolist()
            tokens = batch.tokens_TD.split(batch.lengths)[image]
            torch.testing.assert_close(tokens, single.tokens_TD, atol=1e-6, rtol=1e-6)


def test_merging_takes_rows_of_unequal_length_and_no_rows_before() -> None:
    hidden = torch.randn(3, 2, 20, 5, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[[1, 4, 7], [0, 3, -1]], [[5, -1, -1], [0, 1, 2]], [[9, 8, 3]] * 2])
    got = merged(hidden, kept)
    assert not got[0, 1, 2].any() and not got[1, 0, 1:].any()
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(2)):
        own = kept[tuple(place)]
        alone = merged(hidden[tuple(place)], own[own >= 0])
        torch.testing.assert_close(got[tuple(place)][own >= 0], alone)
    torch.testing.assert_close(got[1, 0, 0], hidden[1, 0].mean(dim=0))


def test_half_precision_is_summed_in_single() -> None:
    tower = Tower.of(2, 49)
    half = tower.hidden.bfloat16()
    kept = torch.tensor([[3, 5], [1, 40]])
    got = merged(half[:, 1:], kept)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, merged(half[:, 1:].float(), kept).bfloat16())
    zipped = visionzip(tower.deep, tower.keys.bfloat16(), half, [4, 5], [2, 3])
    assert zipped.tokens_TD.dtype == torch.bfloat16


def test_groups_hold_every_patch_that_is_left_once() -> None:
    tower = Tower.of(3, 49, seed=2)
    rest = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) < 0.7
    context = contextual_groups(tower.keys[:, 1:], rest, [4, 0, 7])
    assert (context.target_IC >= 0).sum(dim=1).tolist() == [4, 0, 7]
    held = context.group_ICP.sum(dim=1)
    assert held[1].sum() == 0
    for image in (0, 2):
        targets = context.target_IC[image]
        assert rest[image, targets[targets >= 0]].all()
        held[image, targets[targets >= 0]] += 1
        assert torch.equal(held[image] > 0, rest[image]) and held[image].max() == 1


def test_the_published_splits() -> None:
    assert [zip_split(keep) for keep in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]
    for keep in range(1, 600):
        dominant, contextual = zip_split(keep)
        assert dominant >= 1 and contextual >= 0 and dominant + contextual == keep


def test_a_budget_is_shared_in_proportion() -> None:
    assert shared(64, [576, 576, 288]) == [26, 25, 13]
    assert shared(1, [16, 16]) == [1, 0]
    assert shared(3, [16, 0, 8, 0]) == [2, 0, 1, 0]
    sizes = [16, 3, 0, 7, 16]
    for budget in range(1, 60):
        shares = shared(budget, sizes)
        assert sum(shares) == min(budget, 42)
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        if budget < 42:
            ideal = [budget * size / 42 for size in sizes]
            assert all(abs(a - b) < 1 for a, b in zip(shares, ideal, strict=True))
