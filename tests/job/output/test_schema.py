"""Columns and checks of the output files."""

import datetime
import json
from typing import Any

import pyarrow as pa
import pytest

from trio.job.output.schema import (
    KEPT,
    UNITS_KEY,
    build_table,
    check_rows,
    key_of,
    row_key,
    rows_schema,
    split_key,
    stats_schema,
)
from trio.job.output.sink import serialise

ROWS = (
    "row id prompt response finish_reason error note num_images picture image_width image_height"
    " visual_tokens visual_tokens_encoder visual_tokens_stages retention prompt_tokens"
    " output_tokens prefill_flops prefill_flops_unpruned kv_bytes kv_bytes_unpruned prefill_s"
    " decode_s latency_s logprob_mean actor node finished_at prompt_number setting"
)
STATS = (
    "unit setting actor node decode_node start end rows inputs errors error_kinds looped images"
    " prompt_tokens output_tokens visual_tokens retention_sum retention_rows prefill_flops"
    " prefill_flops_unpruned reading_flops reading_flops_unpruned kv_bytes kv_bytes_unpruned"
    " scored right score_sum captions object_share_sum images_encoded prepare_s preprocess_wait_s"
    " encode_s encode_saved_s prefill_s prune_s decode_s idle_s audited audit_s out_of_memory"
    " cuda_graphs running_mean kv_used_bytes_peak device_bytes_peak max_running"
    " batch_tokens kv_budget_bytes"
)


def answer(**changes: Any) -> dict[str, Any]:
    row = {
        "row": 5,
        "response": "a cat",
        "finish_reason": "stop",
        "actor": "a",
        "node": "n",
        "finished_at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "prompt_number": 0,
        "setting": 0,
    }
    return row | changes


def test_columns_are_those_users_rely_on() -> None:
    assert " ".join(rows_schema(pa.int64(), run_id="r").names) == ROWS
    assert rows_schema(pa.int64(), run_id="r", also=[KEPT]).names[-3:] == [
        "kept_tokens",
        "prompt_number",
        "setting",
    ]
    assert " ".join(stats_schema(run_id="r").names) == STATS


def test_id_keeps_the_users_type() -> None:
    assert rows_schema(pa.uint16(), run_id="r").field("id").type == pa.uint16()


def test_metadata_carries_run_and_units() -> None:
    schema = rows_schema(pa.string(), run_id="abc")
    assert schema.metadata[b"trio.run"] == b"abc"
    units = json.loads(schema.metadata[UNITS_KEY])
    assert units["prefill_s"] == "seconds" and units["kv_bytes"] == "bytes"
    assert schema.field("latency_s").metadata[b"unit"] == b"seconds"


def test_row_key_splits_back_and_sorts_by_shard_then_row() -> None:
    for shard, row in [(0, 0), (3, 7), (2**31 - 1, 2**32 - 1)]:
        assert split_key(row_key(shard, row)) == (shard, row)
    assert row_key(1, 0) > row_key(0, 2**32 - 1)
    assert row_key(2**31 - 1, 2**32 - 1) == 2**63 - 1


@pytest.mark.parametrize(("shard", "row"), [(-1, 0), (2**31, 0), (0, 2**32), (0, -1)])
def test_row_key_refuses_numbers_that_do_not_fit(shard: int, row: int) -> None:
    with pytest.raises(AssertionError, match="no key"):
        row_key(shard, row)


def test_absent_values_become_null() -> None:
    schema = rows_schema(pa.string(), run_id="r")
    table = build_table([answer(), answer(row=6, visual_tokens_stages=[3, 2])], schema)
    assert table.schema.equals(schema)
    assert table.column("retention").null_count == 2
    assert table.column("visual_tokens_stages").to_pylist() == [None, [3, 2]]


def test_other_columns_and_nulls_where_none_may_be_are_refused() -> None:
    schema = rows_schema(pa.string(), run_id="r")
    with pytest.raises(AssertionError, match="surprise"):
        build_table([answer(), answer(surprise=1)], schema)
    with pytest.raises(pa.ArrowInvalid, match="actor"):
        serialise(build_table([answer(actor=None)], schema))


@pytest.mark.parametrize(
    "wrong",
    [
        {"error": "x: y"},
        {"finish_reason": "error"},
        {"finish_reason": "error", "error": "x: y"},
        {"finish_reason": "stop", "response": None},
    ],
)
def test_a_row_is_either_an_answer_or_an_error(wrong: dict[str, Any]) -> None:
    check_rows([answer()], 0, 5, 6)
    check_rows([answer(finish_reason="error", error="x: y", response=None)], 0, 5, 6)
    with pytest.raises(AssertionError, match="row 5"):
        check_rows([answer(**wrong)], 0, 5, 6)


@pytest.mark.parametrize("keys", [[4, 5], [4, 6, 5], [4, 5, 5], [4, 5, 6, 7]])
def test_a_unit_has_each_row_once_and_in_order(keys: list[int]) -> None:
    check_rows([answer(row=key) for key in (4, 5, 6)], 0, 4, 7)
    with pytest.raises(AssertionError, match="other keys"):
        check_rows([answer(row=key) for key in keys], 0, 4, 7)


def several(*keys: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [answer(row=row, prompt_number=number, setting=one) for row, number, one in keys]


def test_each_prompt_is_asked_once_in_each_setting() -> None:
    whole = [(4, 0, 0), (4, 0, 1), (4, 1, 0), (4, 1, 1), (5, 0, 0), (5, 0, 1)]
    check_rows(several(*whole), 0, 4, 6, settings=2)
    assert len({key_of(row) for row in several(*whole)}) == 6
    for number in range(len(whole)):
        missing = whole[:number] + whole[number + 1 :]
        for wrong in (missing, [*missing, whole[number]], [*whole, whole[number]]):
            if wrong != whole:
                with pytest.raises(AssertionError, match="other keys"):
                    check_rows(several(*wrong), 0, 4, 6, settings=2)
