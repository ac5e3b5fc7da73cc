"""What rows add up to: counts and sums that merge with ``+``, as columns of ``stats/`` too."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trio.job.output.scoring import exact_match, is_caption, object_share

COUNTS = ("error_kinds", "cuda_graphs")
PAIRS = pa.list_(pa.struct([pa.field("key", pa.string(), nullable=False), ("value", pa.int64())]))
"""A map's entries as a list."""
SECONDS = (
    "prepare_s",
    "preprocess_wait_s",
    "encode_s",
    "prefill_s",
    "prune_s",
    "decode_s",
    "idle_s",
)
PHASES = {
    "waiting for images": "preprocess_wait_s",
    "encoder": "encode_s",
    "prefill": "prefill_s",
    "decode": "decode_s",
    "idle": "idle_s",
}
"""Of an engine, each instant in one of them; `prune_s` is part of prefill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over rows; every field is a plain sum, or counts by name."""

    rows: int = 0
    errors: int = 0
    error_kinds: Mapping[str, int] = field(default_factory=dict)
    images: int = 0
    """Like tokens, of rows that were answered."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    visual_tokens: int = 0
    """From the encoder."""
    retention_sum: float = 0.0
    retention_rows: int = 0
    """Rows that have a retention."""
    prefill_flops: int = 0
    prefill_flops_unpruned: int = 0
    reading_flops: int = 0
    """With the vision encoder and the choice of tokens."""
    reading_flops_unpruned: int = 0
    kv_bytes: int = 0
    kv_bytes_unpruned: int = 0
    scored: int = 0
    """Rows that bring answers, failed ones included."""
    right: int = 0
    captions: int = 0
    """Scored rows whose answer is a list of objects."""
    object_share_sum: float = 0.0
    prepare_s: float = 0.0
    """Decoding and preprocessing of images, on whichever node; like all below in seconds."""
    preprocess_wait_s: float = 0.0
    """Engines that have rows wait for their images."""
    encode_s: float = 0.0
    prefill_s: float = 0.0
    """Without the encoder, with pruning."""
    prune_s: float = 0.0
    """Part of `prefill_s`."""
    decode_s: float = 0.0
    idle_s: float = 0.0
    """Engines without rows."""
    out_of_memory: int = 0
    """Times that a device ran out of memory."""
    cuda_graphs: Mapping[str, int] = field(default_factory=dict)
    """Units by whether their engine used them, "on" or "off: why"; none on a CPU."""

    def __add__(self, other: Totals) -> Totals:
        values = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in dataclasses.fields(self)
            if f.name not in COUNTS
        }
        for name in COUNTS:
            counts = Counter(getattr(self, name)) + Counter(getattr(other, name))
            values[name] = dict(sorted(counts.items()))
        return Totals(**values)

    @property
    def retention(self) -> float | None:
        """Mean over rows of the layer-average retention."""
        return self.retention_sum / self.retention_rows if self.retention_rows else None

    @property
    def flops_ratio(self) -> float | None:
        """Prefill FLOPs without pruning over those with it."""
        return self.prefill_flops_unpruned / self.prefill_flops if self.prefill_flops else None

    @property
    def reading_ratio(self) -> float | None:
        """As `flops_ratio`, with the vision encoder and the choice of tokens."""
        return self.reading_flops_unpruned / self.reading_flops if self.reading_flops else None

    @property
    def kv_ratio(self) -> float | None:
        """KV cache bytes without pruning over those with it."""
        return self.kv_bytes_unpruned / self.kv_bytes if self.kv_bytes else None

    @property
    def accuracy(self) -> float | None:
        """Share of scored rows that were answered rightly."""
        return self.right / self.scored if self.scored else None

    @property
    def object_share(self) -> float | None:
        return self.object_share_sum / self.captions if self.captions else None

    @property
    def error_rate(self) -> float:
        return self.errors / self.rows if self.rows else 0.0

    @property
    def bottleneck(self) -> tuple[str, float] | None:
        """Phase that takes most of the engines' time, and its share; None where none was taken."""
        spent = {phase: getattr(self, name) for phase, name in PHASES.items()}
        whole = sum(spent.values())
        longest = max(spent, key=lambda phase: spent[phase])
        return (longest, spent[longest] / whole) if whole > 0 else None

    def to_stats(self) -> dict[str, Any]:
        """A unit's columns in ``stats/``; what `from_stats` gives back.

        A unit that engines with different `cuda_graphs` shared counts once, under all their states.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        wrong = [n for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        assert not wrong, f"{', '.join(wrong)}: not a finite number"
        return values | {
            "error_kinds": list(self.error_kinds.items()),
            "cuda_graphs": "; ".join(sorted(self.cuda_graphs)) or None,
        }

    @classmethod
    def from_stats(cls, table: pa.Table) -> Totals:
        """Sums over rows of ``stats/``."""
        names = [f.name for f in dataclasses.fields(cls) if f.name not in COUNTS]
        kinds = pc.list_flatten(table.column("error_kinds").cast(PAIRS)).combine_chunks()
        states = table.column("cuda_graphs").drop_null().value_counts()
        return cls(
            **{name: _sum(table.column(name)) for name in names},
            error_kinds=_counts(kinds.field(0), kinds.field(1)),
            cuda_graphs=_counts(states.field(0), states.field(1)),
        )


def _sum(column: pa.ChunkedArray) -> Any:
    """Exact for whole numbers also above 64 bits, to which FLOPs of 10⁶ rows and more add up."""
    if pa.types.is_integer(column.type):
        return int(pc.sum(column.cast(pa.decimal128(38, 0))).as_py() or 0)
    return pc.sum(column).as_py() or 0.0


def _counts(names: pa.Array, counts: pa.Array) -> dict[str, int]:
    table = pa.table({"name": names, "count": counts}).group_by("name")
    summed = table.aggregate([("count", "sum")]).sort_by("name")
    return dict(zip(summed["name"].to_pylist(), summed["count_sum"].to_pylist(), strict=True))


def merge(parts: Iterable[Totals]) -> Totals:
    out = Totals()
    for part in parts:
        out = out + part
    return out


def of_row(
    row: Mapping[str, Any], answers: Sequence[str], reading: tuple[int, int] = (0, 0)
) -> Totals:
    """Totals of one output row; ``answers`` are the right ones, none when it is not scored;
    ``reading``: FLOPs of its prompt with encoder and choice, pruned and unpruned."""
    error, response = row.get("error"), row.get("response")
    retention = row.get("retention")
    captioned = bool(answers) and is_caption(answers)
    answered = response is not None
    return Totals(
        rows=1,
        errors=int(error is not None),
        error_kinds={error.partition(":")[0]: 1} if error is not None else {},
        images=(row.get("num_images") or 0) if answered else 0,
        prompt_tokens=(row.get("prompt_tokens") or 0) if answered else 0,
        output_tokens=(row.get("output_tokens") or 0) if answered else 0,
        visual_tokens=(row.get("visual_tokens") or 0) if answered else 0,
        retention_sum=retention if retention is not None else 0.0,
        retention_rows=int(retention is not None),
        prefill_flops=row.get("prefill_flops") or 0,
        prefill_flops_unpruned=row.get("prefill_flops_unpruned") or 0,
        reading_flops=reading[0],
        reading_flops_unpruned=reading[1],
        kv_bytes=row.get("kv_bytes") or 0,
        kv_bytes_unpruned=row.get("kv_bytes_unpruned") or 0,
        scored=int(bool(answers)),
        right=int(bool(answers) and answered and exact_match(str(response), answers)),
        captions=int(captioned),
        object_share_sum=object_share(str(response), answers) if captioned and answered else 0.0,
    )
