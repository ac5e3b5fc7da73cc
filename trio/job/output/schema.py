"""Columns of ``rows/`` and ``stats/`` as Arrow schemas, and the builders that check what goes in.

INPUT dicts of one row each; OUTPUT an Arrow table in exactly the schema. No torch, no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from trio.job.output.totals import SECONDS

ROW_BITS = 32
ENDS = ("", "_unpruned")
TIMESTAMP = pa.timestamp("us", tz="UTC")
RUN_KEY = b"trio.run"
UNITS_KEY = b"trio.units"


def row_key(shard: int, row: int) -> int:
    """Key of a row: the shard's number in the upper 32 bits, the row in it in the lower 32.

    Raises:
        ValueError: a shard or row number that does not fit (2**31 shards, 2**32 rows).
    """
    if not 0 <= shard < 1 << 31 or not 0 <= row < 1 << ROW_BITS:
        raise ValueError(f"shard {shard}, row {row}: no 64-bit key for these numbers")
    return shard << ROW_BITS | row


def split_key(key: int) -> tuple[int, int]:
    """(shard, row) of a row key."""
    return key >> ROW_BITS, key & (1 << ROW_BITS) - 1


def _field(name: str, kind: pa.DataType, unit: str | None = None, null: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=null, metadata={"unit": unit} if unit else None)


def _count(name: str, unit: str) -> pa.Field:
    return _field(name, pa.int64(), unit, null=False)


def rows_schema(id_type: pa.DataType, *, run_id: str, save_kept: bool = False) -> pa.Schema:
    """Schema of ``rows/*.parquet``; ``id_type`` is the type of the user's ``id`` column."""
    fields = [
        _field("row", pa.int64(), null=False),
        _field("id", id_type),
        _field("prompt", pa.string()),
        _field("response", pa.string()),
        _field("finish_reason", pa.string(), null=False),
        _field("error", pa.string()),
        _field("note", pa.string()),
        _field("num_images", pa.int32(), "images"),
        _field("image_width", pa.int32(), "pixels"),
        _field("image_height", pa.int32(), "pixels"),
        _field("visual_tokens", pa.int32(), "tokens"),
        _field("visual_tokens_encoder", pa.int32(), "tokens"),
        _field("visual_tokens_stages", pa.list_(pa.int32()), "tokens"),
        _field("retention", pa.float64(), "fraction"),
        _field("prompt_tokens", pa.int32(), "tokens"),
        _field("output_tokens", pa.int32(), "tokens"),
        _field("prefill_flops", pa.int64(), "floating point operations"),
        _field("prefill_flops_unpruned", pa.int64(), "floating point operations"),
        _field("kv_bytes", pa.int64(), "bytes"),
        _field("kv_bytes_unpruned", pa.int64(), "bytes"),
        _field("prefill_s", pa.float64(), "seconds"),
        _field("decode_s", pa.float64(), "seconds"),
        _field("latency_s", pa.float64(), "seconds"),
        _field("logprob_mean", pa.float64(), "nats"),
        _field("actor", pa.string(), null=False),
        _field("node", pa.string(), null=False),
        _field("finished_at", TIMESTAMP, "UTC", null=False),
    ]
    if save_kept:
        kept = pa.list_(pa.list_(pa.int32()))
        fields.append(_field("kept_tokens", kept, "indices of visual tokens, one list per stage"))
    return pa.schema(fields, metadata=metadata_of(fields, run_id))


def stats_schema(*, run_id: str) -> pa.Schema:
    """Schema of ``stats/*.parquet``: one row per unit, with a column for each field of `Totals`."""
    flops = "floating point operations"
    fields = [
        _field("unit", pa.string(), null=False),
        _count("rows", "rows"),
        _count("errors", "rows"),
        _field("error_kinds", pa.map_(pa.string(), pa.int64()), "rows", null=False),
        _field("actor", pa.string(), null=False),
        _field("node", pa.string(), null=False),
        _field("decode_node", pa.string()),
        _field("start", TIMESTAMP, "UTC", null=False),
        _field("end", TIMESTAMP, "UTC", null=False),
        _count("images", "images"),
        _count("prompt_tokens", "tokens"),
        _count("output_tokens", "tokens"),
        _count("visual_tokens", "tokens"),
        _field("retention_sum", pa.float64(), "fraction", null=False),
        _count("retention_rows", "rows"),
        *(_count(f"{what}_flops{end}", flops) for what in ("prefill", "reading") for end in ENDS),
        *(_count(f"kv_bytes{end}", "bytes") for end in ENDS),
        *(_count(name, "rows") for name in ("scored", "right", "captions")),
        _field("object_share_sum", pa.float64(), "fraction", null=False),
        *(_field(name, pa.float64(), "seconds", null=False) for name in SECONDS),
        _field("running_mean", pa.float64(), "requests"),
        _field("kv_used_bytes_peak", pa.int64(), "bytes"),
        _field("device_bytes_peak", pa.int64(), "bytes"),
        _count("out_of_memory", "times"),
        _field("max_running", pa.int64(), "requests"),
        _field("batch_tokens", pa.int64(), "tokens"),
        _field("kv_budget_bytes", pa.int64(), "bytes"),
        _field("cuda_graphs", pa.string()),
    ]
    return pa.schema(fields, metadata=metadata_of(fields, run_id))


def metadata_of(fields: Iterable[pa.Field], run_id: str) -> dict[bytes, bytes]:
    """What every file of a run says about itself: the run's id and the units of its columns."""
    units = {f.name: f.metadata[b"unit"].decode() for f in fields if f.metadata}
    return {RUN_KEY: run_id.encode(), UNITS_KEY: json.dumps(units).encode()}


def build_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows in the schema's columns and types; what a row leaves out is null.

    Unknown columns, a null where the contract allows none, and a row that is both an answer and an
    error are mistakes of this package, hence assertions.
    """
    names = set(schema.names)
    required = [field.name for field in schema if not field.nullable]
    for row in rows:
        assert not set(row) - names, f"unknown columns {sorted(set(row) - names)}"
        missing = [name for name in required if row.get(name) is None]
        assert not missing, f"row {row.get('row')}: no {', '.join(missing)}"
        if "finish_reason" in names:
            _check_outcome(row)
    arrays = [pa.array([row.get(f.name) for row in rows], type=f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _check_outcome(row: Mapping[str, Any]) -> None:
    reason, failed = row["finish_reason"], row.get("error") is not None
    assert reason in ("stop", "length", "error"), f"finish_reason {reason!r}"
    assert failed == (reason == "error"), f"row {row['row']}: {reason!r} with error {failed}"
    assert failed != (row.get("response") is not None), f"row {row['row']}: response and error"


def check_keys(rows: Sequence[Mapping[str, Any]], shard: int, start: int, stop: int) -> None:
    """Every row of the unit once and in input order: one row in, one row out."""
    keys = [row["row"] for row in rows]
    expected = [row_key(shard, index) for index in range(start, stop)]
    assert keys == expected, f"shard {shard}, rows {start} to {stop}: got {len(keys)} other keys"
