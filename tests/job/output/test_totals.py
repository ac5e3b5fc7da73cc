"""Sums that merge."""

import random
from typing import Any

import pytest

from trio.job.output.totals import Totals, merge, of_row

GOOD: dict[str, Any] = {
    "response": "a red 7",
    "error": None,
    "num_images": 2,
    "prompt_tokens": 70,
    "output_tokens": 4,
    "visual_tokens": 64,
    "retention": 0.25,
    "prefill_flops": 100,
    "prefill_flops_unpruned": 300,
    "kv_bytes": 10,
    "kv_bytes_unpruned": 50,
}
BAD = {"response": None, "error": "image_empty: zero: bytes"}


def test_one_row() -> None:
    good = of_row(GOOD, ["a red 7"])
    assert (good.rows, good.errors, good.images, good.right, good.scored) == (1, 0, 2, 1, 1)
    assert (good.captions, good.object_share, good.accuracy) == (1, 1.0, 1.0)
    assert (good.flops_ratio, good.kv_ratio, good.retention) == (3.0, 5.0, 0.25)


def test_a_row_in_error_counts_as_wrong() -> None:
    bad = of_row(BAD, ["a red 7"])
    assert (bad.errors, bad.images, bad.right, bad.scored, bad.object_share) == (1, 0, 0, 1, 0.0)
    assert bad.error_kinds == {"image_empty": 1} and bad.retention is None


def test_without_answers_nothing_is_scored() -> None:
    assert of_row(GOOD, []).scored == 0 and of_row(GOOD, []).accuracy is None


def test_split_then_merge_is_the_whole() -> None:
    rows = [of_row(GOOD | {"retention": n / 64}, ["x"] if n % 2 else []) for n in range(30)]
    rows += [of_row(BAD, []), of_row(BAD | {"error": "too_long: 9"}, [])]
    rows += [Totals(out_of_memory=2, cuda_graphs={state: 1}) for state in ("on", "off: why", "on")]
    whole = merge(rows)
    random.Random(0).shuffle(rows)
    assert merge([merge(rows[:7]), Totals(), merge(rows[7:20]), merge(rows[20:])]) == whole
    assert whole.error_kinds == {"image_empty": 1, "too_long": 1}
    assert whole.out_of_memory == 6 and whole.cuda_graphs == {"off: why": 1, "on": 2}
    assert whole.retention == pytest.approx(sum(n / 64 for n in range(30)) / 30)
    assert whole.error_rate == 2 / 32


def test_json_gives_the_totals_back() -> None:
    whole = merge([of_row(GOOD, ["a red 7"]), of_row(BAD, [])])
    assert Totals.from_json(whole.to_json()) == whole


def test_nothing_divides_by_zero() -> None:
    empty = Totals()
    assert (empty.retention, empty.flops_ratio, empty.kv_ratio, empty.error_rate) == (
        None, None, None, 0.0,
    )  # fmt: skip
