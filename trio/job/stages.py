"""The three stages through which Ray Data moves a unit: read, prepare, answer.

A dataset's row is one unit (rows [start, stop) of a shard), so it is never split or joined:

    read     task, no CPU      Parquet            -> the unit's rows, images still encoded
    prepare  task on any node  encoded images     -> the model's uint8 pixels
    answer   actor, one engine pixels and prompts -> rows/UNIT.parquet and a receipt

Row errors are data: a row that cannot be read, decoded or answered goes on as an error. A process
that dies loses the units in its hands, and no stage tries again: `passes` does.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from PIL import Image

from trio.engine.request import Unservable
from trio.errors import UserError, first_line, kind_and_line
from trio.job.desk import ALIVE_S, Desk, Poll
from trio.job.engines.engine_actor import Engine
from trio.job.engines.engine_settings import (
    EngineFactory,
    EngineSettings,
    PreprocessorFactory,
    PreprocessorLike,
)
from trio.job.images import pixel_cell
from trio.job.images.image_files import load_images
from trio.job.images.policy import RowError
from trio.job.images.time_limit import TimeLimit
from trio.job.input.columns import Columns
from trio.job.input.joined_pictures import JoinedPictures, PictureFiles
from trio.job.input.manifest import Shard
from trio.job.input.own_columns import with_partitions
from trio.job.input.reader import RunReader, ShardChanged, ShardUnreadable
from trio.job.input.units import Unit
from trio.job.output.gallery import IMAGE_SIZES
from trio.job.output.output_rows import (
    Ask,
    RowSettings,
    Source,
    identify,
    note_images,
    note_thumbnails,
    picture_of,
    sources,
)
from trio.job.output.sink import Answered, Sink
from trio.job.output.totals import Totals, merge
from trio.job.storage import exists, open_location, parent

DRIVER = "driver"
"""Stands for an engine where it was the driver that committed a unit."""
OTHERS = 3
# shards by which a reader tells a file that is gone from a storage that is away
READ_PAUSES_S = (1.0, 5.0)
# before a unit that could not be read is tried again
PREPARED = pa.struct(
    [
        ("num_images", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("note", pa.string()),
        ("picture", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("header", pa.binary()),
        ("thumbnails", pa.list_(pa.binary())),
        ("image_sizes", IMAGE_SIZES),
    ]
)
# of a row: what is known of its images, its error, where its pixels lie, what a page shows of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the stages of a run are told; travels to every worker."""

    engine: EngineSettings
    rows: RowSettings
    columns: Columns
    pictures: PictureFiles | None = None
    """That are joined with the rows."""
    sink: Sink
    factory: EngineFactory
    preprocessor: PreprocessorFactory | None
    """Of the model; None: engines take decoded images as they are."""
    stall_s: float
    """An engine with work in which nothing moves for so long is ended."""
    pauses_s: tuple[float, ...]
    """Before the next try of what failed once, twice, ..."""

    def pause_s(self, failures: int) -> float:
        return self.pauses_s[min(failures, len(self.pauses_s)) - 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one read task reads."""

    units: tuple[Unit, ...]
    shards: Mapping[int, Shard]
    """Theirs, by number."""
    others: tuple[str, ...]
    """Paths of a few other shards: if all that are near are gone, the storage is away."""


@dataclass(frozen=True, slots=True)
class Block:
    """A unit between two stages: one row of the dataset."""

    unit: Unit
    path: str
    table: pa.Table
    """Columns by role; after `prepare` without images and with PREPARED."""
    pixels: pa.Array | None = None
    """One cell: the images of all rows."""
    node: str = ""
    """Where they were decoded."""
    prepare_s: float = 0.0

    def pack(self) -> pa.Table:
        unit = self.unit
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table)
        pixels = pa.nulls(1, pa.large_binary()) if self.pixels is None else self.pixels
        return pa.table(
            {
                "unit": pa.array([unit.name]),
                "path": pa.array([self.path]),
                "node": pa.array([self.node]),
                "prepare_s": pa.array([self.prepare_s]),
                "table": pixel_cell.cell_of(sink.getvalue()),
                "pixels": pixels,
            }
        )

    @classmethod
    def unpack(cls, row: pa.Table) -> Block:
        said = row.select(["unit", "path", "node", "prepare_s"]).to_pylist()[0]
        unit = Unit.of_name(said["unit"])
        assert unit is not None and row.num_rows == 1, f"{row.num_rows} rows of {said['unit']}"
        (cell,) = row.column("table").chunks
        (pixels,) = row.column("pixels").chunks
        table = pa.ipc.open_stream(pixel_cell.bytes_of(cell)).read_all()
        return cls(unit, said["path"], table, pixels, said["node"], said["prepare_s"])


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a unit that came through."""

    unit: Unit
    done: bool
    """False: nobody looked at it, as the run is to stop."""
    node: str
    parts: tuple[Totals, ...] = ()
    """Of each setting."""
    answered: Answered | None = None
    """The rows themselves; None where they are committed."""
    ready_s: float = 0.0
    """Since its engine was ready."""
    engine: str = DRIVER
    """Name of the engine that committed it."""

    @property
    def totals(self) -> Totals:
        return merge(self.parts)

    def pack(self) -> pa.Table:
        return pa.table({"receipt": pa.array([pickle.dumps(self)], pa.large_binary())})


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A row whose answer is not to be had."""

    id: Any = None
    asks: Sequence[Ask] = (Ask(),)
    carried: pa.Table
    """Its columns that go along."""


def receipts_of(batch: pa.Table) -> list[Receipt]:
    return [pickle.loads(cell) for cell in batch.column("receipt").to_pylist()]


@contextmanager
def _telling(desk: Desk, stage: str) -> Iterator[None]:
    """What a stage raises is a mistake of this package or of the machine, never a row's: it ends
    the run, as Ray Data would pass over it in silence."""
    try:
        yield
    except Exception as error:
        desk.last_note("fail", f"{stage}: {kind_and_line(error)}")
        raise


# read


def read(
    run: Run, columns: Columns, desk: Desk, pictures: PictureFiles | None = None
) -> Iterator[pa.Table]:
    """The units of a run, one after the other, until the run is to stop."""
    poll, joined = Poll(desk), JoinedPictures(pictures) if pictures else None
    reader = RunReader(run.shards, columns.roles, partial(_wait_and_look, run, desk))
    with _telling(desk, "read"):
        for unit in run.units:
            if poll.stopped():
                break
            path = run.shards[unit.shard].path
            found = reader.read(unit)
            if isinstance(found, ShardUnreadable):
                desk.note("unread", unit, found.kind, str(found))
                found = _errors(unit, columns, found)
            elif joined is not None:
                found = _with_pictures(found, joined, unit, columns, desk)
            found = with_partitions(found, path, columns)
            yield Block(unit, path, found).pack()
        reader.close()


def _with_pictures(
    table: pa.Table, joined: JoinedPictures, unit: Unit, columns: Columns, desk: Desk
) -> pa.Table:
    """The rows with their pictures; errors where these cannot be read in several tries."""
    for pause_s in (*READ_PAUSES_S, None):
        try:
            return joined.beside(table)
        except (OSError, pa.ArrowException) as error:
            fault = ShardUnreadable(f"pictures: {first_line(error)}")
        if pause_s is not None:
            desk.note("say", f"{fault}; next try in {pause_s:g} s")
            time.sleep(pause_s)
    desk.note("unread", unit, fault.kind, str(fault))
    return _errors(unit, columns, fault)


def _errors(unit: Unit, columns: Columns, fault: ShardUnreadable) -> pa.Table:
    """As many rows as the unit has, each with the error.

    Their ids and prompts are unknown where the data set brings some: a null is no made-up id, and
    an empty prompt is not the default one.
    """
    rows = unit.stop - unit.start
    error = {"kind": fault.kind, "message": str(fault)}
    table = {"prepared": pa.array([error] * rows, PREPARED)}
    if "id" in columns.roles:
        table["id"] = pa.nulls(rows)
    if "prompt" in columns.roles:
        table["prompt"] = pa.array([""] * rows)
    return pa.table(table)


def _wait_and_look(run: Run, desk: Desk, shard: Shard, tried: int, fault: ShardUnreadable) -> None:
    """Before another try. A shard that is away and not alone is no row's error: a mount, a store or
    a node is at fault, which will be mended, and the run goes on from here then."""
    near = sorted(run.shards.values(), key=lambda other: abs(other.number - shard.number))
    others = [other.place for other in near[1 : OTHERS + 1]] + list(run.others)
    if not isinstance(fault, ShardChanged) and others and not any(map(_there, others)):
        desk.note("user", str(fault))
        desk.wait_for_the_end()
    desk.note("say", f"{fault}; next try in {READ_PAUSES_S[tried - 1]:g} s")
    time.sleep(READ_PAUSES_S[tried - 1])


def _there(path: str) -> bool:
    try:
        return exists(open_location(path))
    except OSError:
        return False


# prepare


def prepare(row: pa.Table, task: Task, desk: Desk) -> pa.Table:
    """A unit's images: fetched, decoded and processed; each row's errors are its own."""
    with _telling(desk, "prepare"):
        return _prepared(row, task, desk)


def _prepared(row: pa.Table, task: Task, desk: Desk) -> pa.Table:
    began = said_at = time.perf_counter()
    block = Block.unpack(row)
    # What Pillow says of damaged files, the note of their row does.
    warnings.filterwarnings("ignore", module="PIL")
    Image.MAX_IMAGE_PIXELS = task.rows.policy.max_pixels
    preprocessor, base = _preprocessor(task, desk), parent(block.path)
    known = block.table.column("prepared") if "prepared" in block.table.column_names else None
    made: list[dict[str, Any]] = []
    images: list[Sequence[Any]] = []
    seen: dict[str, tuple[Source, Sequence[Any]]] = {}
    found = sources(block.table, block.unit, block.path)
    shown = _pictures_shown(found, base, task.rows)
    with TimeLimit(task.rows.policy.row_timeout) as limit:
        for source in found:
            if time.perf_counter() - said_at > ALIVE_S:
                said_at = time.perf_counter()
                desk.note("preparing")
            mine: Sequence[Any] = ()
            said = (None if known is None else known[source.index].as_py()) or {}
            if not said:
                try:
                    with limit.row():
                        mine = _images(source, base, task, preprocessor, seen, shown)
                except RowError as error:
                    said = {"kind": error.kind, "message": error.message}
            images.append(mine)
            made.append(_noted(source) | said)
    pixels, headers = pixel_cell.pack(images)
    rows = [row | {"header": header} for row, header in zip(made, headers, strict=True)]
    names = [n for n in block.table.column_names if n not in ("image", "prepared")]
    table = block.table.select(names).append_column("prepared", pa.array(rows, PREPARED))
    node = ray.get_runtime_context().get_node_id()
    took = time.perf_counter() - began
    return Block(block.unit, block.path, table, pixels, node, took).pack()


def _pictures_shown(found: Sequence[Source], base: Any, settings: RowSettings) -> set[str | None]:
    """Pictures of the rows that may be kept for a page; others may have the same ones."""
    out: set[str | None] = set()
    for source in found:
        if settings.shows(source.key):
            with suppress(RowError):
                out.add(picture_of(source.cell("image"), base))
    return out - {None}


def _noted(source: Source) -> dict[str, Any]:
    width, height = source.size or (None, None)
    sizes = {"num_images": source.num_images, "width": width, "height": height}
    shown = {
        "thumbnails": list(source.thumbnails) or None,
        "image_sizes": [{"width": w, "height": h} for w, h in source.image_sizes] or None,
    }
    return sizes | {"note": source.note, "picture": source.picture} | shown


def _preprocessor(task: Task, desk: Desk) -> PreprocessorLike | None:
    """The model's, where it can be stopped at uint8 pixels; without one no row can be prepared."""
    if task.preprocessor is None:
        return None
    try:
        made = task.preprocessor(task.engine)
        return made if made.cut else None
    except UserError as error:
        desk.note("user", str(error))
    except Exception as error:
        desk.note("fail", f"no preprocessor: {kind_and_line(error)}")
    desk.wait_for_the_end()


def _images(
    source: Source,
    base: Any,
    task: Task,
    preprocessor: PreprocessorLike | None,
    seen: dict[str, tuple[Source, Sequence[Any]]],
    shown: Collection[str | None],
) -> Sequence[Any]:
    """What the engine is given of a row's images.

    Args:
        source: the row.
        base: directory of its shard.
        task: what the stages are told.
        preprocessor: of the model.
        seen: images of rows before, by their picture.
        shown: pictures of rows that may be kept for a page: of the first row with one of them, too,
            thumbnails are made.

    Raises:
        RowError: whatever a row does to a library is its own failure.
    """
    cell = source.cell("image")
    source.picture = picture_of(cell, base)
    identify(source, task.rows)
    if source.picture is None and task.rows.asking is not None and task.rows.asking.without_picture:
        source.num_images = 0
        return ()
    if source.picture is not None and source.picture in seen:
        like, found = seen[source.picture]
        source.num_images, source.size, source.note = like.num_images, like.size, like.note
        source.thumbnails, source.image_sizes = like.thumbnails, like.image_sizes
        return found
    try:
        images = load_images(cell, base, task.rows.policy)
        note_images(source, images)
        if source.picture in shown or task.rows.shows(source.key):
            with suppress(Exception):  # what a page lacks must not cost the row
                note_thumbnails(source, images)
        found = images if preprocessor is None else preprocessor.process(images)
    except RowError:
        raise
    except Unservable as error:
        raise RowError(error.kind, str(error)) from error
    except MemoryError as error:
        raise RowError("image_oversized", "the images take more memory than there is") from error
    except Exception as error:
        raise RowError("image_unreadable", kind_and_line(error)) from error
    if source.picture is not None:
        seen[source.picture] = source, found
    return found


# answer


class answer:
    """An engine and the units it answers; a unit is committed here unless only its rows are
    wanted."""

    def __init__(self, task: Task, desk: Desk, commits: bool) -> None:
        self._task, self._desk, self._commits = task, desk, commits
        self._engine = Engine(task, desk)

    def __call__(self, row: pa.Table) -> pa.Table:
        with _telling(self._desk, "answer"):
            return self._answered(row)

    def _answered(self, row: pa.Table) -> pa.Table:
        block = Block.unpack(row)
        if self._engine.stopped():
            return Receipt(block.unit, False, self._engine.node).pack()
        answered = self._engine.answer(block.unit, self._sources(block))
        answered = replace(answered, carried=self._task.columns.carried(block.table))
        if not self._commits:
            _, parts = self._engine.taken(answered, block.prepare_s)
            answered = replace(answered, parts=parts)
            return Receipt(block.unit, True, self._engine.node, parts, answered).pack()
        parts = self._engine.commit(block.unit, answered, block.node, block.prepare_s)
        ready_s, name = self._engine.ready_s, self._engine.name
        return Receipt(
            block.unit, True, self._engine.node, parts, ready_s=ready_s, engine=name
        ).pack()

    def _sources(self, block: Block) -> Iterator[tuple[Source, Sequence[Any] | RowError]]:
        """Rows with their images, or with their error."""
        prepared = block.table.column("prepared").to_pylist()
        for source, said in zip(
            sources(block.table, block.unit, block.path), prepared, strict=True
        ):
            source.num_images, source.note = said["num_images"], said["note"]
            source.picture = said["picture"]
            if said["width"] is not None:
                source.size = (said["width"], said["height"])
            source.thumbnails = said["thumbnails"] or ()
            sizes = said["image_sizes"] or ()
            source.image_sizes = [(size["width"], size["height"]) for size in sizes]
            if said["kind"] is None:
                yield source, pixel_cell.unpack(block.pixels, said["header"])
            else:
                with suppress(RowError):
                    identify(source, self._task.rows)
                yield source, RowError(said["kind"], said["message"])


def describe(run: Run, columns: Columns, settings: RowSettings) -> Described:
    """What is known of a single row, its images unread: of one that killed processes."""
    roles = {role: name for role, name in columns.roles.items() if role != "image"}
    (unit,) = run.units
    path = run.shards[unit.shard].path
    reader = RunReader(run.shards, roles, lambda *_: None)
    table = reader.read(unit) if roles else pa.table({"": pa.nulls(1)})
    reader.close()
    if isinstance(table, ShardUnreadable):
        return Described(carried=columns.carried(pa.table({"": pa.nulls(1)})))
    table = with_partitions(table, path, columns)
    (source,) = sources(table, unit, path)
    with suppress(RowError):
        identify(source, settings)
    return Described(id=source.id, asks=source.asks, carried=columns.carried(table))
