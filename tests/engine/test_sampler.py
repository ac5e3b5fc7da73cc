import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trio.engine.decoding.sampler import choose, distribution, stream
from trio.engine.request import Sampling
from trio.errors import UserError


def logits(rows: int, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_likeliest_and_reports_its_probability() -> None:
    table = logits(4)
    chosen = choose(table, [Sampling()] * 4, [random.Random()] * 4)
    assert chosen.token_ids == table.argmax(-1).tolist()
    expected = table.log_softmax(-1).max(-1).values.tolist()
    assert chosen.logprobs == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 3.0),
    st.sampled_from([None, 1, 7, 500]),
    st.sampled_from([1e-60, 1e-6, 0.4, 0.9, 1.0]),
    st.sampled_from([None, 0.0, 0.05, 1.0]),
)
def test_distribution_equals_the_warpers_of_transformers(
    temperature: float, top_k: int | None, top_p: float, min_p: float | None
) -> None:
    table, none = logits(5), torch.LongTensor(5, 0)
    expected = TemperatureLogitsWarper(temperature)(none, table)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(none, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(none, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(none, expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(distribution(table, [sampling] * 5), expected.softmax(-1))


def test_settings_of_one_row_leave_the_others_alone() -> None:
    table = logits(4)
    samplings = [
        Sampling(temperature=0.5),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.0, top_p=0.3),
        Sampling(temperature=2.0, min_p=0.2),
    ]
    together = distribution(table, samplings)
    for row, sampling in enumerate(samplings):
        alone = distribution(table[row : row + 1], [sampling])
        torch.testing.assert_close(together[row], alone[0])


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=4)
    table = logits(1, vocabulary=8).expand(4000, 8)
    chosen = choose(table, [sampling] * 4000, [stream(Sampling(seed=s)) for s in range(4000)])
    shares = torch.bincount(torch.tensor(chosen.token_ids), minlength=8) / 4000
    torch.testing.assert_close(shares, distribution(table[:1], [sampling])[0], atol=0.03, rtol=0)


def test_a_drawn_token_reports_its_probability_before_temperature_and_cuts() -> None:
    table = logits(1)
    sampling = Sampling(temperature=0.2, top_k=3, seed=5)
    chosen = choose(table, [sampling], [stream(sampling)])
    expected = table.log_softmax(-1)[0, chosen.token_ids[0]].item()
    assert chosen.logprobs[0] == pytest.approx(expected, abs=1e-6)


class Fixed(random.Random):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token() -> None:
    table = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(temperature=1.0, top_k=2)
    for value, token in ((0.0, 1), (1 - 2**-53, 2)):
        assert choose(table, [sampling], [Fixed(value)]).token_ids == [token]


@pytest.mark.parametrize(
    ("wrong", "temperature", "dtype"),
    [
        (math.nan, 0.0, torch.float32),
        (math.inf, 1.0, torch.float16),
        (-math.inf, 1.0, torch.bfloat16),
    ],
)
def test_a_row_that_is_not_finite_is_told_and_leaves_the_others_alone(
    wrong: float, temperature: float, dtype: torch.dtype
) -> None:
    table = logits(5).to(dtype)
    samplings = [Sampling(temperature=temperature, top_k=9, top_p=0.9, seed=s) for s in range(5)]
    expected = choose(table, samplings, list(map(stream, samplings)))
    table[1, 30] = wrong
    table[3] = wrong
    got = choose(table, samplings, list(map(stream, samplings)))
    assert [math.isnan(own) for own in got.logprobs] == [False, True, False, True, False]
    for row in (0, 2, 4):
        assert got.token_ids[row] == expected.token_ids[row]
        assert got.logprobs[row] == expected.logprobs[row]
    assert all(0 <= token < 50 for token in got.token_ids)


def test_greedy_rows_do_not_advance_their_stream() -> None:
    streams = [random.Random(1), random.Random(2)]
    before = streams[0].getstate()
    choose(logits(2), [Sampling(), Sampling(temperature=1.0)], streams)
    assert streams[0].getstate() == before


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"temperature": -1.0},
     {"temperature": math.nan}, {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 1.1},
     {"top_k": -1}, {"top_k": 2.5}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": "x"},
     {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf}, {"repetition_penalty": "x"},
     {"no_repeat_ngram_size": -1}, {"no_repeat_ngram_size": 1.5}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_forbid_every_token_fail_their_own_row(temperature: float) -> None:
    table = logits(3)
    ruled = table.clone()
    ruled[1] = -math.inf
    drawing = [Sampling(temperature=temperature, seed=seed) for seed in range(3)]
    chosen = choose(table, drawing, [stream(s) for s in drawing], ruled)
    alone = choose(table, drawing, [stream(s) for s in drawing])
    assert chosen.logprobs[1] == -math.inf
    for row in (0, 2):
        assert chosen.token_ids[row] == alone.token_ids[row]
        assert chosen.logprobs[row] == alone.logprobs[row]
