"""Order, budgets per image, and the methods without scores."""

from __future__ import annotations

import torch

from tests.pruning.stages import chosen
from tests.tiny.llava import tiny_llava
from trio.decoder.decoder import Decoder
from trio.pruning.batch import Ragged
from trio.pruning.method import Choice, packed_index, rank
from trio.pruning.methods.random import salt_of
from trio.pruning.options import Pruning


def ranked(scores: torch.Tensor, starts: list[int], counts: list[int]) -> list[list[int]]:
    index = packed_index(torch.tensor(starts), torch.tensor(counts), max(counts))
    order = rank(scores, *index).tolist()
    assert all(sorted(own) == list(range(max(counts))) for own in order)
    return [own[:count] for own, count in zip(order, counts, strict=True)]


def test_equal_scores_go_to_the_lower_index() -> None:
    scores = torch.tensor([9.0, 1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 1.0])
    assert ranked(scores, [1, 6], [5, 2]) == [[1, 2, 4, 0, 3], [0, 1]]
    many = torch.zeros(500)
    assert ranked(many, [0], [500]) == [list(range(500))]


def test_zeros_and_subnormals_stay_in_front_of_padding() -> None:
    scores = torch.tensor([0.0, 1e-42, 0.0, 5.0, 4.0, 3.0, 2.0])
    assert ranked(scores, [0, 3], [2, 4]) == [[1, 0], [0, 1, 2, 3]]


def random_choice(spans: list[list[tuple[int, int]]], keep: int, salts: list[int]) -> Choice:
    lengths = tuple(max(stop for _, stop in own) + 2 for own in spans)
    choice = chosen(
        Pruning(schedule="1:4", method="random", seed=3),
        torch.empty(sum(lengths), 4),
        Ragged.of_spans(lengths, spans),
        [[keep] * len(own) for own in spans],
        salts=salts,
    )
    assert choice is not None
    return choice


def test_random_depends_on_seed_and_request_not_on_the_batch() -> None:
    alone = random_choice([[(2, 40), (41, 79)]], 10, [5]).kept
    batch = random_choice([[(0, 30)], [(2, 40), (41, 79)]], 10, [8, 5]).kept
    assert [batch[1, number] for number in (0, 1)] == [alone[0, number] for number in (0, 1)]
    assert alone[0, 0] != alone[0, 1]
    assert random_choice([[(2, 40), (41, 79)]], 10, [6]).kept != alone
    assert all(own == sorted(set(own)) and len(own) == 10 for own in alone.values())


def test_random_is_spread_evenly() -> None:
    hits = torch.zeros(20)
    for salt in range(400):
        hits[random_choice([[(0, 20)]], 5, [salt]).kept[0, 0]] += 1
    assert ((hits > 60) & (hits < 140)).all()  # 100 expected, standard deviation 9


def test_salt_follows_the_tokens() -> None:
    assert salt_of([1, 2, 3]) == salt_of((1, 2, 3)) != salt_of([1, 23])


def test_nothing_to_remove_scores_nothing() -> None:
    """There is no decoder that it could be scored with."""
    batch = Ragged.of_spans((9, 5), [[(1, 4)], []])
    assert chosen(Pruning(schedule="1:3"), torch.zeros(14, 4), batch, [[3], None]) is None


def decoder() -> Decoder:
    model = tiny_llava(layers=3)
    return Decoder(model.model.language_model, model.lm_head)


def test_gradient_is_the_order_cut_off() -> None:
    torch.manual_seed(0)
    batch = Ragged.of_spans((50, 30), [[(3, 20), (22, 44)], [(1, 25)]])
    pruning = Pruning(schedule="1:4", method="gradient")
    choice = chosen(pruning, torch.randn(80, 32), batch, [[6, 22], [4]], decoder=decoder())
    assert choice is not None and choice.saliency is not None
    scores = choice.saliency.scores_T
    assert choice.kept[0, 0] == sorted(scores[3:20].argsort(descending=True)[:6].tolist())
    assert (0, 1) not in choice.kept
    assert choice.kept[1, 0] == sorted(scores[51:75].argsort(descending=True)[:4].tolist())


def test_a_callers_autocast_does_not_reach_the_scores() -> None:
    own, batch = decoder(), Ragged.of_spans([70], [[(2, 66)]])
    hidden = torch.randn(70, own.hidden_size, generator=torch.Generator().manual_seed(0))

    def scores() -> torch.Tensor:
        choice = chosen(Pruning(schedule="1:20"), hidden, batch, [[20]], decoder=own)
        assert choice is not None and choice.saliency is not None
        return choice.saliency.scores_T[2:66]

    plain = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(), plain)
