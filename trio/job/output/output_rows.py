"""One input row to the request it asks for, and one result back to an output row. No Ray, no torch.

INPUT a unit's table under role names; OUTPUT per row a ``Source`` (what it says) and, once the
engine has answered, the dict that ``schema.build_table`` takes.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.types as pt
from PIL.Image import Image

from trio.engine.request import Request, Result, Sampling
from trio.errors import UserError, first_line
from trio.job.images.image_files import note_of
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.images.thumbnails import thumbnails
from trio.job.input.answers import texts
from trio.job.input.columns import OWN
from trio.job.input.kinds.found_shard import row_name
from trio.job.input.units import Unit
from trio.job.output.schema import KEPT, SCORE, row_key, rows_schema, split_key
from trio.job.output.scoring import exact_match
from trio.job.storage import Location
from trio.vqa.presets.prompt_template import PromptTemplate

if TYPE_CHECKING:
    from trio.job.comparing.audit import Audit
    from trio.job.output.gallery import Sample
    from trio.job.questions.asking import Asking

OF_RESULT = tuple(
    name for name in rows_schema(pa.null(), run_id="", also=[KEPT]).names if hasattr(Result, name)
)
"""Columns of ``rows/`` that an engine's result holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """What turns a row into a request."""

    prompts: tuple[str, ...]
    # for rows without one
    sampling: Sampling
    policy: ImagePolicy
    seed: int
    also: tuple[str, ...] = ()
    # groups of columns that the output has beside those of all runs
    shared_directory: str | None = None
    # of the shards, to be left out of ids; None where file names alone tell them apart
    template: PromptTemplate | None = None
    # of the prompt; None: rows bring it, or take `prompts`
    asking: Asking | None = None
    # None: each row has one prompt, and answers are not scored by a metric
    audit: Audit | None = None
    gallery: Sample | None = None
    # rows that may be kept for a page

    def shows(self, row: int) -> bool:
        """Whether an input row, by its key, may be kept for a page."""
        return self.gallery is not None and row in self.gallery


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One prompt of a row: it becomes an output row in each setting."""

    prompt: str | None = None
    # None: it could not be read
    answers: Sequence[str] = ()
    # right ones, for scoring
    fields: Mapping[str, Any] = field(default_factory=dict)
    # what a metric needs beside the answer
    groups: Mapping[str, str] = field(default_factory=dict)
    # values of columns by which figures are given
    candidates: tuple[str, ...] = ()
    # answers to be scored in place of one of the model's own


@dataclass(slots=True)
class Source:
    """What one input row says, as far as it could be read."""

    key: int
    table: pa.Table
    index: int
    path: str
    id: Any = None
    asks: Sequence[Ask] = (Ask(),)
    picture: str | None = None
    # what tells its images from those of other rows
    size: tuple[int, int] | None = None
    # width and height in pixels of the first image
    num_images: int | None = None
    note: str | None = None
    # what had to be mended in its images
    thumbnails: Sequence[bytes] = ()
    # JPEG files of its first images, where it may be kept for a page
    image_sizes: Sequence[tuple[int, int]] = ()
    # width and height in pixels of all of them, then

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
            raise RowError(f"{role.lstrip('.')}_invalid", "the text is not UTF-8") from error
        except (ValueError, OverflowError) as error:  # Python's dates end in 9999
            raise RowError(f"{role.lstrip('.')}_invalid", first_line(error)) from error

    def own_columns(self) -> dict[str, Any]:
        """Values of the columns that prompts are made of; errors as of `cell`."""
        own = [name for name in self.table.column_names if name.startswith(OWN)]
        return {name.removeprefix(OWN): self.cell(name) for name in own}


def sources(table: pa.Table, unit: Unit, path: str) -> list[Source]:
    """Every row of a unit, in order."""
    assert table.num_rows == unit.stop - unit.start, f"{table.num_rows} rows for {unit}"
    return [
        Source(key=row_key(unit.shard, unit.start + i), table=table, index=i, path=path)
        for i in range(table.num_rows)
    ]


def picture_of(cell: Any, base: Location) -> str | None:
    """A digest that rows with the same images share; None without images.

    Args:
        cell: of the image column.
        base: directory of the shard, from which paths lead.
    """
    digest = hashlib.blake2b(digest_size=8)
    parts = cell if isinstance(cell, list) else [cell]
    for part in parts:
        data = (part.get("bytes") or part.get("path")) if isinstance(part, dict) else part
        if not isinstance(data, str | bytes):
            return None
        where = b""
        if isinstance(data, str):
            where, data = base.uri.encode(), data.encode("utf-8", "surrogatepass")
        digest.update(b"%s %d " % (where, len(data)))
        digest.update(data)
    return digest.hexdigest() if parts else None


def note_images(source: Source, images: Sequence[Image]) -> None:
    """Note on a source what its images are."""
    source.num_images = len(images)
    source.size = images[0].size
    source.note = note_of(images)


def note_thumbnails(source: Source, images: Sequence[Image]) -> None:
    """Note on a source what a page shows of its images."""
    source.thumbnails = thumbnails(images)
    source.image_sizes = [image.size for image in images]


def requests_of(
    source: Source, images: Sequence[Any], settings: RowSettings
) -> Iterator[Request | RowError]:
    """The requests of a row's prompts, with its images, or the error of a prompt; notes on the
    source what it reads.

    Raises:
        RowError: the row cannot be asked.
    """
    identify(source, settings)
    system = source.cell("system")
    for number, ask in enumerate(source.asks):
        if ask.prompt is None or not ask.prompt.strip():
            yield RowError("prompt_missing", "the prompt is empty")
            continue
        sampling = _sampling(settings, source, number)
        if settings.audit is not None and settings.audit.chooses(source.key):
            sampling = replace(sampling, first_logprobs=True)
        yield Request(
            prompt=ask.prompt,
            images=tuple(images),
            id=source.key,
            system=system,
            sampling=sampling,
            candidates=ask.candidates,
            with_eos=settings.asking is not None and settings.asking.questions.with_eos,
            explain=settings.shows(source.key),
        )


def identify(source: Source, settings: RowSettings) -> None:
    """Note on a source its id, its prompts and what belongs to them.

    Raises:
        RowError: something of it cannot be read, or there is no prompt.
    """
    source.id = _id_of(source, settings)
    if settings.asking is not None:
        source.asks = settings.asking.asks(source)
        return
    prompts = prompts_of(source, settings.template, settings.prompts)
    if not prompts:
        raise RowError("prompt_missing", "the row has no prompt, and --prompt gives none")
    if not any(prompt is not None and prompt.strip() for prompt in prompts):
        raise RowError("prompt_missing", "the row's prompt is empty")
    # Should its answers not be readable:
    source.asks = tuple(Ask(prompt=prompt) for prompt in prompts)
    answers = source.cell("answers", texts) or ()
    source.asks = tuple(Ask(prompt=prompt, answers=answers) for prompt in prompts)


def prompts_of(
    source: Source, template: PromptTemplate | None, otherwise: Sequence[str] = ()
) -> Sequence[str | None]:
    """The row's own, made of its columns where there is a template; else those of all rows.

    Raises:
        RowError: the template cannot be filled.
    """
    if template is not None:
        try:
            return [template.fill(source.own_columns())]
        except UserError as error:
            raise RowError("prompt_invalid", str(error)) from error
    own: str | list[str | None] | None = source.cell("prompt")
    if own is None or own == []:
        return otherwise
    return [own] if isinstance(own, str) else own


def _id_of(source: Source, settings: RowSettings) -> Any:
    if "id" in source.table.column_names:
        return source.cell("id", _stored)
    key = settings.asking.key(source) if settings.asking is not None else None
    return _made_up_id(source, settings) if key is None else key


def _made_up_id(source: Source, settings: RowSettings) -> str:
    """Of a row whose data set brings no ids: its file and the row in it."""
    file = row_name(source.path, settings.shared_directory)
    return f"{file}#{split_key(source.key)[1]}"


def _stored(cell: pa.Scalar) -> Any:
    """A cell as Arrow takes it back: Python's dates and times end at microseconds."""
    if isinstance(cell, pa.ExtensionScalar):
        return None if cell.value is None else _stored(cell.value)
    return cell.value if pt.is_temporal(cell.type) else cell.as_py()


def _sampling(settings: RowSettings, source: Source, prompt_number: int) -> Sampling:
    """Each prompt draws from its own stream, so neither batching nor a retry changes its answer.
    Settings that are compared share it. A row's own seed alone makes its stream.

    Raises:
        RowError: what the row says of it cannot be.
    """
    said = {name: source.cell(name) for name in ("max_new_tokens", "temperature")}
    try:
        base = replace(settings.sampling, **{n: v for n, v in said.items() if v is not None})
    except UserError as error:
        raise RowError("setting_invalid", str(error)) from error
    if base.temperature == 0:
        return base
    seed, key = source.cell("seed"), source.key
    if seed is not None:
        key = 0
    else:
        seed = settings.seed
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9) % (1 << 62)
    mixed = (mixed + prompt_number * 0x94D049BB133111EB) % (1 << 62)
    return replace(base, seed=mixed)


def output_row(
    source: Source,
    outcome: Result | RowError,
    settings: RowSettings,
    *,
    actor: str,
    node: str,
    prompt_number: int = 0,
    setting: int = 0,
) -> dict[str, Any]:
    """The row of ``rows/`` for an answer or an error to one of the row's prompts."""
    ask = source.asks[prompt_number]
    if isinstance(outcome, RowError):
        row: dict[str, Any] = {"finish_reason": "error", "error": str(outcome)}
    else:
        row = {name: getattr(outcome, name) for name in OF_RESULT}
        row["response"] = None if outcome.finish_reason == "error" else outcome.response or ""
        for name in ("prefill_flops", "prefill_flops_unpruned"):
            row[name] = None if row[name] is None else round(row[name])
        if KEPT not in settings.also:
            del row["kept_tokens"]
    if settings.asking is not None:
        row |= settings.asking.columns_of(ask, source, outcome)
        if row.get("response") is not None:
            row["response"] = row["prediction"]
    elif SCORE in settings.also and ask.answers:
        answered = row.get("response")
        row["score"] = float(answered is not None and exact_match(answered, ask.answers))
    return row | {
        "row": source.key,
        "id": source.id,
        "prompt": ask.prompt,
        "note": source.note,
        "num_images": source.num_images,
        "picture": source.picture,
        "image_width": source.size[0] if source.size else None,
        "image_height": source.size[1] if source.size else None,
        "actor": actor,
        "node": node,
        "finished_at": datetime.datetime.now(datetime.UTC),
        "prompt_number": prompt_number,
        "setting": setting,
    }
