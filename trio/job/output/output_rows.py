"""One input row to the request it asks for, and one result back to an output row. No Ray, no torch.

INPUT a unit's table under role names; OUTPUT per row a ``Source`` (what it says) and, once the
engine has answered, the dict that ``schema.build_table`` takes.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
from PIL.Image import Image

from trio.engine.request import Request, Result, Sampling
from trio.job.images.image_files import note_of
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.input.answers import texts
from trio.job.input.units import Unit
from trio.job.output.schema import row_key, rows_schema, split_key
from trio.job.storage import bare

OF_RESULT = tuple(
    name
    for name in rows_schema(pa.null(), run_id="", save_kept=True).names
    if hasattr(Result, name)
)
"""Columns of ``rows/`` that an engine's result holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """What turns a row into a request."""

    prompt: str | None
    # for rows without one
    sampling: Sampling
    policy: ImagePolicy
    seed: int
    save_kept: bool
    shared_directory: str | None = None
    # of the shards, to be left out of ids; None where file names alone tell them apart


@dataclass(slots=True)
class Source:
    """What one input row says, as far as it could be read."""

    key: int
    table: pa.Table
    index: int
    path: str
    id: Any = None
    prompt: str | None = None
    size: tuple[int, int] | None = None
    # width and height in pixels of the first image
    num_images: int | None = None
    note: str | None = None
    # what had to be mended in its images
    reading_flops: tuple[int, int] = (0, 0)
    # once answered: of the prompt with encoder and choice of tokens, pruned and unpruned

    def cell(self, role: str, read: Callable[[pa.Scalar], Any] = lambda cell: cell.as_py()) -> Any:
        """The row's value in a column; None where the shard has no such column.

        Raises:
            RowError: text that is not UTF-8.
        """
        if role not in self.table.column_names:
            return None
        try:
            return read(self.table.column(role)[self.index])
        except UnicodeDecodeError as error:
            raise RowError(f"{role}_invalid", "the text is not UTF-8") from error


def sources(table: pa.Table, unit: Unit, path: str) -> list[Source]:
    """Every row of a unit, in order."""
    assert table.num_rows == unit.stop - unit.start, f"{table.num_rows} rows for {unit}"
    return [
        Source(key=row_key(unit.shard, unit.start + i), table=table, index=i, path=path)
        for i in range(table.num_rows)
    ]


def note_images(source: Source, images: Sequence[Image]) -> None:
    """Note on a source what its images are."""
    source.num_images = len(images)
    source.size = images[0].size
    source.note = note_of(images)


def request_of(source: Source, images: Sequence[Any], settings: RowSettings) -> Request:
    """The row's request, with its images; notes on the source what it reads.

    Raises:
        RowError: the row cannot be asked.
    """
    prompt = identify(source, settings)
    answers_of(source)
    sampling = _sampling(settings, source.key)
    return Request(prompt=prompt, images=tuple(images), id=source.key, sampling=sampling)


def identify(source: Source, settings: RowSettings) -> str:
    """Note id and prompt on a source; returns the prompt.

    Raises:
        RowError: one of them cannot be read, or there is no prompt.
    """
    has_id = "id" in source.table.column_names
    source.id = source.cell("id", _stored) if has_id else _made_up_id(source, settings)
    own = source.cell("prompt")
    prompt: str | None = settings.prompt if own is None else own
    if prompt is None:
        raise RowError("prompt_missing", "the row has no prompt, and --prompt gives none")
    if not prompt.strip():
        raise RowError("prompt_missing", "the row's prompt is empty")
    source.prompt = prompt
    return prompt


def _made_up_id(source: Source, settings: RowSettings) -> str:
    """Of a row whose data set brings no ids: its file and the row in it."""
    shared = settings.shared_directory
    path = bare(source.path)
    file = os.path.basename(path) if shared is None else path.removeprefix(shared)
    return f"{file}#{split_key(source.key)[1]}"


def _stored(cell: pa.Scalar) -> Any:
    """A cell as Arrow takes it back: Python's dates and times end at microseconds."""
    if isinstance(cell, pa.ExtensionScalar):
        return None if cell.value is None else _stored(cell.value)
    return cell.value if pt.is_temporal(cell.type) else cell.as_py()


def _sampling(settings: RowSettings, key: int) -> Sampling:
    """Each row draws from its own stream, so neither batching nor a retry changes its answer."""
    base = settings.sampling
    if base.temperature == 0:
        return base
    mixed = (settings.seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9) % (1 << 62)
    return replace(base, seed=mixed)


def answers_of(source: Source) -> Sequence[str]:
    """Right answers that the row brings for scoring; empty when it brings none.

    Raises:
        RowError: text that is not UTF-8.
    """
    return source.cell("answers", texts) or []


def output_row(
    source: Source, outcome: Result | RowError, *, actor: str, node: str, save_kept: bool
) -> dict[str, Any]:
    """The row of ``rows/`` for an answer or an error."""
    if isinstance(outcome, RowError):
        row: dict[str, Any] = {"finish_reason": "error", "error": str(outcome)}
    else:
        row = {name: getattr(outcome, name) for name in OF_RESULT}
        row["response"] = None if outcome.finish_reason == "error" else outcome.response or ""
        for name in ("prefill_flops", "prefill_flops_unpruned"):
            row[name] = None if row[name] is None else round(row[name])
        if not save_kept:
            del row["kept_tokens"]
    return row | {
        "row": source.key,
        "id": source.id,
        "prompt": source.prompt,
        "note": source.note,
        "num_images": source.num_images,
        "image_width": source.size[0] if source.size else None,
        "image_height": source.size[1] if source.size else None,
        "actor": actor,
        "node": node,
        "finished_at": datetime.datetime.now(datetime.UTC),
    }
