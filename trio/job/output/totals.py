"""What a unit adds up to: counts and sums that merge with ``+``, kept with the unit's rows.

Every output file carries the totals of its rows as JSON in its schema's metadata, so a run that was
stopped and resumed knows the sums of what it did before without reading a row.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trio.job.output.scoring import exact_match, is_caption, object_share

COUNTS = ("error_kinds", "cuda_graphs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over rows; every field is a plain sum, or counts by name."""

    rows: int = 0
    errors: int = 0
    error_kinds: Mapping[str, int] = field(default_factory=dict)
    images: int = 0
    # of rows that were answered
    prompt_tokens: int = 0
    output_tokens: int = 0
    visual_tokens: int = 0
    # from the encoder
    retention_sum: float = 0.0
    retention_rows: int = 0
    # rows that have a retention
    prefill_flops: int = 0
    prefill_flops_unpruned: int = 0
    reading_flops: int = 0
    # with the vision encoder and the choice of tokens
    reading_flops_unpruned: int = 0
    kv_bytes: int = 0
    kv_bytes_unpruned: int = 0
    scored: int = 0
    # rows that bring answers, failed ones included
    right: int = 0
    captions: int = 0
    # scored rows whose answer is a list of objects
    object_share_sum: float = 0.0
    out_of_memory: int = 0
    # times that a device ran out of memory
    cuda_graphs: Mapping[str, int] = field(default_factory=dict)
    # files by whether their engine used them, "on" or "off: why"; none on a CPU

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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Totals:
        return cls(**json.loads(text))


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
