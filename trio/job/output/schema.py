"""Columns of ``rows/`` and ``stats/`` as Arrow schemas, and the builders that check what goes in.

INPUT dicts of one row each; OUTPUT an Arrow table in exactly the schema. No torch, no Ray.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import pyarrow as pa

from trio.job.output.totals import Totals

ROW_BITS = 32
TIMESTAMP = pa.timestamp("us", tz="UTC")
RUN_KEY = b"trio.run"
UNITS_KEY = b"trio.units"


def pairs(value: pa.DataType) -> pa.DataType:
    """Values by name, as `as_pairs` makes them: `datasets` reads no maps."""
    return pa.list_(pa.struct([("name", pa.string()), ("value", value)]))


KINDS: dict[Any, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    Mapping[str, int]: pairs(pa.int64()),
}
"""Of columns, by the types of `Totals`."""


def row_key(shard: int, row: int) -> int:
    """Key of a row: the shard's number in the upper 32 bits, the row in it in the lower 32."""
    assert 0 <= shard < 1 << 31 and 0 <= row < 1 << ROW_BITS, f"no key for {shard}, {row}"
    return shard << ROW_BITS | row


def split_key(key: int) -> tuple[int, int]:
    """(shard, row) of a row key."""
    return key >> ROW_BITS, key & (1 << ROW_BITS) - 1


def _field(name: str, kind: pa.DataType, unit: str | None = None, null: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=null, metadata={"unit": unit} if unit else None)


KEPT, SCORE, QUESTION, LIKELIHOOD, KEEP = "kept", "score", "question", "likelihood", "keep"
AUDIT = "audit"
OPTIONAL: dict[str, list[pa.Field]] = {
    KEPT: [
        _field(
            "kept_tokens",
            pa.list_(pa.list_(pa.int32())),
            "indices of visual tokens, one list per stage",
        )
    ],
    SCORE: [_field("score", pa.float64(), "fraction")],
    QUESTION: [
        _field("answers", pa.list_(pa.string())),
        _field("metric", pa.string()),
        _field("fields", pa.string(), "JSON"),
        _field("groups", pairs(pa.string())),
        _field("prediction", pa.string()),
    ],
    LIKELIHOOD: [
        _field("choices", pa.list_(pa.string())),
        _field("choice_logprobs", pa.list_(pa.float64()), "nats"),
        _field("choice_tokens", pa.list_(pa.int32()), "tokens"),
        _field("p_choice", pa.list_(pa.float64()), "probability"),
        _field("p_first", pa.float64(), "probability"),
        _field("margin", pa.float64(), "nats"),
    ],
    KEEP: [_field("keep", pa.bool_())],
    AUDIT: [
        _field("audit_response", pa.string()),
        _field("audit_match", pa.bool_()),
        _field("audit_overlap", pa.float64(), "fraction"),
        _field("audit_top1", pa.float64(), "fraction"),
        _field("audit_kl", pa.float64(), "nats"),
        _field("audit_repeat_match", pa.bool_()),
        _field("audit_error", pa.string()),
    ],
}
"""Columns that not every run has, by what asks for them."""


def rows_schema(id_type: pa.DataType, *, run_id: str, also: Sequence[str] = ()) -> pa.Schema:
    """Schema of ``rows/*.parquet``.

    Args:
        id_type: of the user's ``id`` column.
        run_id: the run's id.
        also: of the groups of columns in `OPTIONAL` those that the run has.
    """
    fields = [
        _field("row", pa.int64(), null=False),
        _field("id", id_type),
        _field("prompt", pa.string()),
        _field("response", pa.string()),
        _field("finish_reason", pa.string(), null=False),
        _field("error", pa.string()),
        _field("note", pa.string()),
        _field("num_images", pa.int32(), "images"),
        _field("picture", pa.string()),
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
        *(field for group, own in OPTIONAL.items() if group in also for field in own),
        _field("prompt_number", pa.int16(), null=False),
        _field("setting", pa.int16(), null=False),
    ]
    return pa.schema(fields, metadata=metadata_of(fields, run_id))


def stats_schema(*, run_id: str) -> pa.Schema:
    """Schema of ``stats/*.parquet``: one row per unit and setting, with a column for each field of
    `Totals`."""
    hints = get_type_hints(Totals, include_extras=True)
    sums = {name: get_args(hint) for name, hint in hints.items() if name != "cuda_graphs"}
    fields = [
        _field("unit", pa.string(), null=False),
        _field("setting", pa.int16(), null=False),
        _field("actor", pa.string(), null=False),
        _field("node", pa.string(), null=False),
        _field("decode_node", pa.string()),
        _field("start", TIMESTAMP, "UTC", null=False),
        _field("end", TIMESTAMP, "UTC", null=False),
        *(_field(name, KINDS[kind], unit, null=False) for name, (kind, unit) in sums.items()),
        _field("cuda_graphs", pa.string()),
        _field("running_mean", pa.float64(), "requests"),
        _field("kv_used_bytes_peak", pa.int64(), "bytes"),
        _field("device_bytes_peak", pa.int64(), "bytes"),
        _field("max_running", pa.int64(), "requests"),
        _field("batch_tokens", pa.int64(), "tokens"),
        _field("kv_budget_bytes", pa.int64(), "bytes"),
    ]
    return pa.schema(fields, metadata=metadata_of(fields, run_id))


def metadata_of(fields: Iterable[pa.Field], run_id: str) -> dict[bytes, bytes]:
    """What every file of a run says about itself: the run's id and the units of its columns."""
    units = {f.name: f.metadata[b"unit"].decode() for f in fields if f.metadata}
    return {RUN_KEY: run_id.encode(), UNITS_KEY: json.dumps(units).encode()}


def build_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows in the schema's columns and types; what a row leaves out is null. Where none may be,
    Arrow refuses to write it; other columns are a mistake of this package."""
    unknown = set().union(*rows) - set(schema.names)
    assert not unknown, f"unknown columns {sorted(unknown)}"
    return pa.Table.from_pylist(list(rows), schema=schema)


def key_of(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """What no other row of a run has."""
    return row["row"], row["prompt_number"], row["setting"]


def check_rows(
    rows: Sequence[Mapping[str, Any]], shard: int, start: int, stop: int, settings: int = 1
) -> None:
    """Every row of the unit in order, with each of its prompts once in each setting, each either an
    answer or an error."""
    prompts = Counter(row["row"] for row in rows if not row["setting"])
    expected = [
        (key, prompt, setting)
        for key in (row_key(shard, index) for index in range(start, stop))
        for prompt in range(max(1, prompts[key]))
        for setting in range(settings)
    ]
    keys = list(map(key_of, rows))
    assert keys == expected, f"shard {shard}, rows {start} to {stop}: got {len(keys)} other keys"
    for row in rows:
        failed = row.get("error") is not None
        whole = failed == (row["finish_reason"] == "error") == (row.get("response") is None)
        assert whole, f"row {row['row']}: neither an answer nor an error, or both"
