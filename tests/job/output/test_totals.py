"""Sums that merge."""

from random import Random
from typing import Any, get_type_hints

import pyarrow as pa
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
    "score": 1.0,
}
BAD = {"response": None, "error": "image_empty: zero: bytes", "score": 0.0}


def test_one_row() -> None:
    good = of_row(GOOD, ["a red 7"])
    assert (good.rows, good.errors, good.images, good.right, good.scored) == (1, 0, 2, 1, 1)
    assert (good.captions, good.object_share_sum, good.retention) == (1, 1.0, 0.25)
    assert (good.prefill_flops, good.kv_bytes_unpruned, good.prompt_tokens) == (100, 50, 70)


def test_a_row_in_error_counts_as_wrong() -> None:
    bad = of_row(BAD, ["a red 7"])
    assert (bad.errors, bad.images, bad.right, bad.scored) == (1, 0, 0, 1)
    assert (bad.captions, bad.object_share_sum) == (1, 0.0)
    assert bad.error_kinds == {"image_empty": 1} and bad.retention is None


def test_without_answers_nothing_is_scored() -> None:
    unscored = of_row(GOOD | {"score": None}, [])
    assert (unscored.scored, unscored.right, unscored.captions) == (0, 0, 0)


def test_a_row_of_the_input_counts_once() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = [GOOD | {"prompt_number": prompt, "setting": setting} for prompt, setting in keys]
    whole = merge(of_row(row, []) for row in rows)
    assert (whole.rows, whole.inputs, whole.images) == (4, 1, 8)


def numbers(kind: Any) -> st.SearchStrategy[Any]:
    """Sums that are exact in any order; whole ones of two parts may leave 64 bits."""
    if kind is int:
        return st.integers(0, 2**63 - 1)
    if kind is float:
        return st.integers(0, 2**40).map(lambda n: n / 64)
    return st.dictionaries(
        st.sampled_from(["image_empty", "too_long", "odd: é"]), st.integers(1, 9)
    )


PARTS = st.lists(
    st.builds(
        Totals,
        **{n: numbers(kind) for n, kind in get_type_hints(Totals).items() if n != "cuda_graphs"},
        cuda_graphs=st.sampled_from([{}, {"on": 1}, {"off: why": 1}]),
    ),
    max_size=6,
)
SCHEMA = stats_schema(run_id="r")


def stored(part: Totals) -> pa.Table:
    return build_table([{"unit": "u", "setting": 0, **STATS, **part.to_stats()}], SCHEMA)


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


def test_nothing_divides_by_zero() -> None:
    assert (Totals().retention, Totals().error_rate) == (None, 0.0)
