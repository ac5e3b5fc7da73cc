"""``gallery/``: some rows with all that a page shows of them, so that it needs neither input nor
model.

INPUT output rows of sampled input rows and what the engine said; OUTPUT rows of `GALLERY_SCHEMA`, a
file for each unit that has some, under the unit's name. No Ray, no torch.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trio.engine.request import Explanation, Result
from trio.job.images.policy import RowError
from trio.job.output.schema import build_table, metadata_of, row_key

if TYPE_CHECKING:
    from trio.job.input.manifest import Manifest
    from trio.job.input.units import Unit
    from trio.job.output.output_rows import Source

GALLERY = "gallery"
"""The folder."""
WIDER = 10
"""Rows among which errors and disagreements are looked for, for each row of the sample."""
MOST_ROWS = 10_000
"""Of a sample: its keys travel to every worker, and a page shows no more."""
SAMPLE, DISAGREEMENT, ERROR = "sample", "disagreement", "error"
IMAGE_SIZES = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32())]))
_MANTISSA = np.uint32(0xFFFFE000)
"""Sign, exponent and 10 bits of a float32."""

GALLERY_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_number", pa.int32(), nullable=False),
        pa.field("setting", pa.int32(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("error", pa.string()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("score", pa.float64()),
        pa.field("audit_response", pa.string()),
        pa.field("audit_match", pa.bool_()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("visual_tokens", pa.int32()),
        pa.field("retention", pa.float64()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("thumbnails", pa.list_(pa.binary()), nullable=False),
        pa.field("image_sizes", IMAGE_SIZES, nullable=False),
        pa.field("image_tokens", pa.list_(pa.int32())),
        pa.field("boxes", pa.list_(pa.float32())),
        pa.field("kept_tokens", pa.list_(pa.list_(pa.int32()))),
        pa.field("saliency", pa.list_(pa.list_(pa.float32()))),
    ]
)
_OF_ROW = (
    "row", "prompt_number", "setting", "id", "prompt", "response", "error", "score",
    "audit_response", "audit_match", "finish_reason", "visual_tokens", "retention", "prompt_tokens",
    "output_tokens",
)  # fmt: skip
"""Columns of ``rows/`` that go along as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Which input rows may be kept, by their keys; travels to the workers."""

    kept: frozenset[int]
    """Whatever becomes of them."""
    wider: frozenset[int]
    """`kept`, and those of which errors and disagreements are kept."""

    def __contains__(self, row: int) -> bool:
        return row in self.wider

    def has_some_of(self, unit: Unit) -> bool:
        return any(row_key(unit.shard, row) in self for row in range(unit.start, unit.stop))


def sample_of(
    manifest: Manifest, limit: int | None, count: int, seed: int, only_row: int | None = None
) -> Sample | None:
    """The sample of a run; None where nothing is to be kept. It follows from the arguments alone,
    and that of a smaller count is part of it.

    Args:
        manifest: the input.
        limit: rows of the run; None for all.
        count: rows that are kept whatever becomes of them.
        seed: the run's.
        only_row: key of the only row of the run, if it has but one.
    """
    if not count:
        return None
    if only_row is not None:
        return Sample(kept=frozenset({only_row}), wider=frozenset({only_row}))
    rows = manifest.rows if limit is None else min(limit, manifest.rows)
    ends = list(accumulate(shard.rows for shard in manifest.shards))
    keys = []
    for place in drawn(rows, WIDER * count, seed):
        at = bisect_right(ends, place)
        shard = manifest.shards[at]
        keys.append(row_key(shard.number, place - (ends[at] - shard.rows)))
    return Sample(kept=frozenset(keys[:count]), wider=frozenset(keys))


def drawn(rows: int, count: int, seed: int) -> list[int]:
    """`count` different numbers below `rows`, or all of them, in random order: those of a smaller
    count come first."""
    generator = random.Random(f"{GALLERY} {seed}")
    moved: dict[int, int] = {}
    out: list[int] = []
    for last in range(rows - 1, rows - 1 - min(count, rows), -1):
        place = generator.randrange(last + 1)
        out.append(moved.get(place, place))
        moved[place] = moved.pop(last, last)
    return out


Prompted = tuple["Source", Sequence[Mapping[str, Any]], Sequence[Result | RowError]]
"""Of one prompt: its input row; of each setting the row of ``rows/``, and what was made into it."""


def gallery_rows(sample: Sample | None, prompts: Iterable[Prompted]) -> tuple[dict[str, Any], ...]:
    """What is kept of prompts, as `gallery_table` takes it."""
    if sample is None:
        return ()
    mine = (prompt for prompt in prompts if prompt[0].key in sample)
    return tuple(line for prompt in mine for line in _lines(sample, *prompt))


def _lines(
    sample: Sample,
    source: Source,
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Result | RowError],
) -> Iterator[dict[str, Any]]:
    differ = len({row.get("response") for row in rows}) > 1
    for row, outcome in zip(rows, outcomes, strict=True):
        if source.key in sample.kept:
            why = SAMPLE
        elif row.get("error") is not None:
            why = ERROR
        elif differ or row.get("audit_match") is False:
            why = DISAGREEMENT
        else:
            continue
        answers = row.get("answers") or list(source.asks[row["prompt_number"]].answers)
        shown = {
            "thumbnails": list(source.thumbnails),
            "image_sizes": [{"width": w, "height": h} for w, h in source.image_sizes],
        }
        told = {name: row.get(name) for name in _OF_ROW} | _of_outcome(outcome)
        yield told | shown | {"why": why, "answers": answers or None}


def _of_outcome(outcome: Result | RowError) -> dict[str, Any]:
    if isinstance(outcome, RowError):
        return {}
    explained = {} if outcome.explanation is None else _explained(outcome.explanation)
    return {"kept_tokens": outcome.kept_tokens} | explained


def _explained(explanation: Explanation) -> dict[str, Any]:
    return {
        "image_tokens": list(explanation.image_tokens),
        "boxes": np.asarray(explanation.boxes, np.float32).reshape(-1),
        "saliency": [_cut(scores) for scores in explanation.saliency],
    }


def _cut(scores: np.ndarray) -> np.ndarray:
    """To three digits: more of them take twice the room in a file."""
    return (np.ascontiguousarray(scores, np.float32).view(np.uint32) & _MANTISSA).view(np.float32)


def gallery_table(
    lines: Sequence[Mapping[str, Any]], id_type: pa.DataType, run_id: str
) -> pa.Table:
    """Rows of `GALLERY_SCHEMA`.

    Args:
        lines: of `gallery_rows`.
        id_type: of the ids in them, which become text.
        run_id: the run's id.
    """
    ids = _texts([line["id"] for line in lines], id_type)
    told = [{**line, "id": text} for line, text in zip(lines, ids, strict=True)]
    schema = GALLERY_SCHEMA.with_metadata(metadata_of(GALLERY_SCHEMA, run_id))
    return build_table(told, schema)


def _texts(ids: Sequence[Any], kind: pa.DataType) -> list[str | None]:
    """As Arrow writes them; bytes that are no text in hexadecimal digits."""
    made = pa.array(ids, kind)
    if not isinstance(kind, pa.BaseExtensionType):  # of a UUID it would write the bytes
        with suppress(pa.ArrowException, UnicodeDecodeError):
            texts: list[str | None] = made.cast(pa.string()).to_pylist()
            return texts
    return [
        None if one is None else one.hex() if isinstance(one, bytes) else str(one)
        for one in made.to_pylist()
    ]
