"""Methods without a gradient, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pruning.other_methods import far_apart
from tests.pruning.stages import chosen
from trio.pruning.batch import Ragged
from trio.pruning.method import Context, Stage, Text
from trio.pruning.methods import divprune, eadp
from trio.pruning.methods.divprune import spread_out
from trio.pruning.options import Pruning

COUNTS, KEEPS = (30, 7, 50, 2, 18), (8, 6, 20, 1, 3)


def orders(features: list[Tensor], keeps: tuple[int, ...]) -> list[list[int]]:
    counts = list(map(len, features))
    start_N = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    order_NK = spread_out(torch.cat(features), start_N, counts, keeps)
    return [own[:keep] for own, keep in zip(order_NK.tolist(), keeps, strict=True)]


@pytest.mark.parametrize(("group", "tile"), [(1, 16), (400, 1), (1 << 20, 128)])
def test_far_apart_equals_the_loop(group: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divprune._GROUP, "cpu", group)
    monkeypatch.setattr(divprune, "_TILE", tile)
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(count, 12, generator=generator) for count in COUNTS]
    expected = [far_apart(own, keep) for own, keep in zip(features, KEEPS, strict=True)]
    assert orders(features, KEEPS) == expected
    alone = [orders([own], (keep,))[0] for own, keep in zip(features, KEEPS, strict=True)]
    assert alone == expected


def test_far_apart_begins_with_the_loneliest_and_takes_no_token_twice() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0, 3.1])
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert orders([circle], (3,)) == [[3, 5, 0]]
    # Of tokens alike the lower index, length does not count, and copies come last.
    axes = torch.eye(4)
    same = torch.cat([axes[:2], 3 * axes[:2], axes[2:]])
    assert orders([same], (6,)) == [[4, 0, 1, 5, 2, 3]]
    noise = torch.randn(40, 67, generator=torch.Generator().manual_seed(0))
    ends = torch.cat([noise, noise[7:8].expand(20, -1)])
    assert set(orders([ends], (40,))[0]) == set(range(40))
    assert orders([torch.ones(5, 4)], (4,)) == [[0, 1, 2, 3]]
    assert orders([same.bfloat16()], (6,)) == [[4, 0, 1, 5, 2, 3]]


def three_images(method: str, **facts: Any) -> Any:
    """What is chosen of a request with three images, of which one keeps all."""
    hidden = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    batch = Ragged.of_spans((5, 15), [[], [(1, 6), (6, 8), (9, 14)]])
    pruning = Pruning(schedule="2:3" if method == "fastv" else "0:3", method=method)
    return chosen(pruning, hidden, batch, [None, [3, 3, 3]], layer=2, **facts)


def attend(monkeypatch: pytest.MonkeyPatch, scores_T: Tensor) -> None:
    """The attention that every stage sees."""
    monkeypatch.setattr(Stage, "attention", lambda self: scores_T)


def relevant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What patches matter is what stands for them."""
    monkeypatch.setattr(eadp, "importance", lambda joint_MP, *args, **kwargs: joint_MP[:, 0])


def context(matters_V: Tensor, tile_V: Tensor | None = None) -> Context:
    """Of an image whose tokens matter so much, and come from these tiles."""
    text = Text(torch.empty(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.empty(1, 1))
    count = len(matters_V)
    if tile_V is None:
        return Context(places_V=torch.arange(count), joint_MP=matters_V[:, None], text=text)
    places_V = tile_V.argsort(stable=True).argsort()
    return Context(
        places_V=places_V,
        grids=tuple((1, size) for size in tile_V.bincount().tolist()),
        joint_MP=matters_V[places_V.argsort()][:, None],
        text=text,
    )


def test_attention_takes_the_largest_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal ones the lower index."""
    scores = torch.zeros(15)
    scores[[2, 5, 8, 12]] = torch.tensor([1.0, 0.5, 9.0, 2.0])
    attend(monkeypatch, scores)
    choice = three_images("fastv")
    assert choice.kept == {(1, 0): [0, 1, 4], (1, 2): [0, 1, 3]}
    assert choice.orders[1, 2].tolist() == [3, 0, 1, 2, 4]
    assert choice.saliency is None


def test_eadp_chooses_by_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    relevant(monkeypatch)
    torch.manual_seed(3)
    own = [context(torch.rand(count)) for count in (5, 2, 5)]
    choice = three_images("eadp", contexts=[[], own])
    order = choice.orders[1, 0].tolist()
    assert choice.kept == {(1, 0): sorted(order), (1, 2): choice.kept[1, 2]}
    assert len(order) == 3
    # All that matters in two tiles lies in the second: it gets the whole budget.
    tile_V = torch.tensor([1, 0, 1, 0, 1])
    own[0] = context(tile_V.float(), tile_V)
    assert three_images("eadp", contexts=[[], own]).kept[1, 0] == [0, 2, 4]


@pytest.mark.parametrize("method", ["fastv", "divprune", "eadp", "eadp-tiles"])
@pytest.mark.parametrize(
    ("wrong", "spoilt"), [(float("nan"), [7]), (float("inf"), list(range(6, 11)))]
)
def test_an_image_of_no_numbers_is_told_and_leaves_the_others_alone(
    method: str, wrong: float, spoilt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still gets as many tokens as it is to keep, none twice: others are packed behind it."""
    relevant(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.tensor([0, 0, 1, 1, 1]) if method == "eadp-tiles" else None
    hidden, score = torch.randn(20, 4, generator=generator), torch.rand(20, generator=generator)
    attend(monkeypatch, score)

    def choice() -> Any:
        return chosen(
            Pruning(schedule="0:3", method=method.partition("-")[0]),
            hidden,
            Ragged.of_spans((5, 15), [[(0, 5)], [(1, 6), (9, 14)]]),
            [[3], [3, 3]],
            layer=0,
            contexts=[
                [context(score[:5], tiles)],
                [context(score[6:11], tiles), context(score[14:19], tiles)],
            ],
        )

    before = choice()
    hidden[spoilt] = score[spoilt] = wrong
    after = choice()
    assert all(after.kept[own] == before.kept[own] for own in ((0, 0), (1, 1)))
    own = after.kept[1, 0]
    assert len(set(own)) == 3 and set(own) <= set(range(5))
    for told, expected in ((before, [True, True]), (after, [True, False])):
        assert method == "divprune" or told.finite_B.tolist() == expected
