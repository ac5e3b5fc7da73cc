"""What rows add up to: counts and sums that merge with ``+``, as columns of ``stats/`` too."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa

from trio.job.output.scoring import is_caption, object_share

Rows = Annotated[int, "rows"]
Tokens = Annotated[int, "tokens"]
Flops = Annotated[int, "floating point operations"]
Bytes = Annotated[int, "bytes"]
Seconds = Annotated[float, "seconds"]
COUNTS = ("error_kinds", "cuda_graphs")
OF_ROWS = ("prefill_flops", "prefill_flops_unpruned", "kv_bytes", "kv_bytes_unpruned")
OF_ANSWERS = ("prompt_tokens", "output_tokens", "visual_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over rows. Every field is a plain sum or counts by name, and a column of ``stats/`` in
    the unit that stands with its type."""

    rows: Rows = 0
    """Rows of the output."""
    inputs: Rows = 0
    """Rows of the input: each once, however many prompts and settings it is asked with."""
    errors: Rows = 0
    error_kinds: Annotated[Mapping[str, int], "rows"] = field(default_factory=dict)
    looped: Rows = 0
    """Answers that were ended as they went round in a loop."""
    images: Annotated[int, "images"] = 0
    """Like tokens, of rows that were answered."""
    prompt_tokens: Tokens = 0
    output_tokens: Tokens = 0
    visual_tokens: Tokens = 0
    """From the encoder."""
    retention_sum: Annotated[float, "fraction"] = 0.0
    retention_rows: Rows = 0
    """Rows that have a retention."""
    prefill_flops: Flops = 0
    prefill_flops_unpruned: Flops = 0
    reading_flops: Flops = 0
    """With the vision encoder and the choice of tokens."""
    reading_flops_unpruned: Flops = 0
    kv_bytes: Bytes = 0
    kv_bytes_unpruned: Bytes = 0
    scored: Rows = 0
    """Rows that have a score: those that bring answers, failed ones included."""
    right: Rows = 0
    """Rows whose score is 1."""
    score_sum: Annotated[float, "fraction"] = 0.0
    captions: Rows = 0
    """Scored rows whose answer is a list of objects."""
    object_share_sum: Annotated[float, "fraction"] = 0.0
    images_encoded: Annotated[int, "images"] = 0
    """Images that the encoder read: settings that are compared share what it gives."""
    prepare_s: Seconds = 0.0
    """Decoding and preprocessing of images, on whichever node."""
    preprocess_wait_s: Seconds = 0.0
    """Engines that have rows wait for their images."""
    encode_s: Seconds = 0.0
    """As if a setting were alone, where several share what the encoder gives."""
    encode_saved_s: Seconds = 0.0
    """Of these, what another setting's reading of the same images has spared."""
    prefill_s: Seconds = 0.0
    """Without the encoder, with pruning."""
    prune_s: Seconds = 0.0
    """Part of `prefill_s`."""
    decode_s: Seconds = 0.0
    idle_s: Seconds = 0.0
    """Engines without rows."""
    audited: Rows = 0
    """Rows that were asked unpruned as well; nothing of that is in the other sums."""
    audit_s: Seconds = 0.0
    """What engines spent on it."""
    out_of_memory: Annotated[int, "times"] = 0
    """Times that a device ran out of memory."""
    cuda_graphs: Annotated[Mapping[str, int], "units"] = field(default_factory=dict)
    """Units by whether their engine used them, "on" or "off: why"; none on a CPU."""

    def __add__(self, other: Totals) -> Totals:
        mine, others = self.values(), other.values()
        sums: dict[str, Any] = {n: mine[n] + others[n] for n in mine if n not in COUNTS}
        sums |= {n: Counter(mine[n]) + Counter(others[n]) for n in COUNTS}
        return Totals(**sums)

    @property
    def retention(self) -> float | None:
        """Mean over rows of the layer-average retention."""
        return ratio(self.retention_sum, self.retention_rows)

    @property
    def error_rate(self) -> float:
        return ratio(self.errors, self.rows) or 0.0

    def values(self) -> dict[str, Any]:
        """The sums by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_stats(self) -> dict[str, Any]:
        """A unit's columns in ``stats/``; what `from_stats` gives back.

        A unit that engines with different `cuda_graphs` shared counts once, under all their states.
        """
        return self.values() | {
            "error_kinds": as_pairs(self.error_kinds),
            "cuda_graphs": "; ".join(sorted(self.cuda_graphs)) or None,
        }

    @classmethod
    def from_stats(cls, table: pa.Table) -> Totals:
        """Sums over rows of ``stats/``: Python's, as FLOPs of 10⁶ rows and more pass 64 bits."""
        out = cls()
        for row in table.select([f.name for f in dataclasses.fields(cls)]).to_pylist():
            kinds, graphs = from_pairs(row.pop("error_kinds")), row.pop("cuda_graphs")
            out += cls(error_kinds=kinds, cuda_graphs={graphs: 1} if graphs else {}, **row)
        return out


SECONDS = tuple(f.name for f in dataclasses.fields(Totals) if f.name.endswith("_s"))


def merge(parts: Iterable[Totals]) -> Totals:
    return sum(parts, Totals())


def added(*parts: Sequence[Totals]) -> tuple[Totals, ...]:
    """Of each setting, the sum over what `parts` say of it."""
    return tuple(map(merge, zip(*parts, strict=True)))


def as_pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def from_pairs(cell: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Of a cell that Arrow has turned into Python."""
    return {pair["name"]: pair["value"] for pair in cell or ()}


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to divide by."""
    return part / whole if whole else None


def of_row(
    row: Mapping[str, Any], answers: Sequence[str], reading: tuple[int, int] = (0, 0)
) -> Totals:
    """Totals of one output row; ``answers`` are the right ones, for captions among them;
    ``reading``: FLOPs of its prompt with encoder and choice, pruned and unpruned."""
    error, retention, score = row.get("error"), row.get("retention"), row.get("score")
    response: Any = row.get("response")
    answered = response is not None
    names = (*OF_ROWS, *OF_ANSWERS) if answered else OF_ROWS
    sums: dict[str, Any] = {name: row.get(name) or 0 for name in names}
    captioned = bool(answers) and is_caption(answers)
    return Totals(
        rows=1,
        inputs=int(not (row.get("prompt_number") or row.get("setting"))),
        errors=int(error is not None),
        error_kinds={error.partition(":")[0]: 1} if error is not None else {},
        looped=int(row.get("finish_reason") == "repetition"),
        images=(row.get("num_images") or 0) if answered else 0,
        retention_sum=retention or 0.0,
        retention_rows=int(retention is not None),
        reading_flops=reading[0],
        reading_flops_unpruned=reading[1],
        scored=int(score is not None),
        right=int(score == 1),
        score_sum=score or 0.0,
        captions=int(captioned),
        object_share_sum=object_share(response, answers) if captioned and answered else 0.0,
        **sums,
    )
