"""Sums that merge."""

from dataclasses import fields
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.job.commits import STATS
from trio.job.output.schema import build_table, stats_schema
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


def numbers(kind: str) -> st.SearchStrategy[Any]:
    """Sums that are exact in any order; whole ones of two parts may leave 64 bits."""
    if kind == "int":
        return st.integers(0, 2**63 - 1)
    if kind == "float":
        return st.integers(0, 2**40).map(lambda n: n / 64)
    return st.dictionaries(
        st.sampled_from(["image_empty", "too_long", "odd: é"]), st.integers(1, 9)
    )


PARTS = st.lists(
    st.builds(
        Totals,
        **{f.name: numbers(str(f.type)) for f in fields(Totals) if f.name != "cuda_graphs"},
        cuda_graphs=st.sampled_from([{}, {"on": 1}, {"off: why": 1}]),
    ),
    max_size=6,
)
SCHEMA = stats_schema(run_id="r")


def stored(part: Totals) -> pa.Table:
    return build_table([{"unit": "u", **STATS, **part.to_stats()}], SCHEMA)


@given(PARTS, st.integers(0, 6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_split_then_merge_is_the_whole_in_memory_and_in_stats(
    parts: list[Totals], cut: int, random: Random
) -> None:
    whole = merge(parts)
    table = pa.concat_tables([SCHEMA.empty_table(), *map(stored, parts)])
    assert Totals.from_stats(table) == whole
    assert Totals.from_stats(table.slice(0, cut)) + Totals.from_stats(table.slice(cut)) == whole
    random.shuffle(parts)
    assert merge([merge(parts[:cut]), Totals(), merge(parts[cut:])]) == whole


def test_a_unit_shared_by_unlike_engines_counts_once() -> None:
    shared = Totals(cuda_graphs={"on": 3, "off: why": 1})
    assert Totals.from_stats(stored(shared)).cuda_graphs == {"off: why; on": 1}


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        ({}, None),
        ({"prepare_s": 99.0}, None),
        ({"preprocess_wait_s": 9.0, "encode_s": 1.0}, ("waiting for images", 0.9)),
        ({"prefill_s": 4.0, "prune_s": 3.5, "decode_s": 6.0}, ("decode", 0.6)),
        ({"prefill_s": 4.0, "encode_s": 1.0, "idle_s": 3.0}, ("prefill", 0.5)),
    ],
)
def test_the_bottleneck_counts_each_second_once(spent: dict[str, Any], expected: Any) -> None:
    assert Totals(**spent).bottleneck == expected


def test_nothing_divides_by_zero() -> None:
    empty = Totals()
    assert (empty.retention, empty.flops_ratio, empty.kv_ratio, empty.error_rate) == (
        None, None, None, 0.0,
    )  # fmt: skip
