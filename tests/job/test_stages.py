"""Read, prepare and what answer is given, as functions: no cluster, notes kept in a list."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.job.fakes import fake_engine, png, write_shard
from tests.tiny.llava import save_tiny_checkpoint
from trio.engine.loading import load_preprocessor
from trio.engine.request import Prepared, ProcessedImage, Request, Sampling
from trio.errors import UserError
from trio.families.pixel_tables import finished
from trio.job import stages
from trio.job.engines.engine_settings import build_preprocessor
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.input.columns import Columns, resolve
from trio.job.input.manifest import inspect
from trio.job.input.units import Unit, units
from trio.job.nodes.cluster import Resources
from trio.job.output.gallery import Sample
from trio.job.output.output_rows import Ask, RowSettings, Source, requests_of
from trio.job.output.sink import Sink
from trio.job.runner import engine_settings
from trio.job.settings import made_of
from trio.job.stages import Block, Run, Task

SCHEMA = pa.schema([("id", pa.int64()), ("image", pa.list_(pa.binary())), ("prompt", pa.string())])
NODE = "the node"
ONE = Resources(
    cpus=1, gpus=0, nodes=1, actors=1, gpus_per_actor=0, cpus_per_actor=1, attached=False
)
Images = list[tuple[Source, Any]]


class Ended(BaseException):
    """Stands for the end of a process that waits for the end of its pass."""


class Board:
    """A desk in this process."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []
        self.stop_after = 10**9

    def note(self, kind: str, *what: Any) -> None:
        self.notes.append((kind, *what))

    last_note = note

    def stopped(self) -> bool:
        self.stop_after -= 1
        return self.stop_after < 0

    def wait_for_the_end(self) -> None:
        raise Ended


@pytest.fixture
def desk() -> Any:
    return Board()


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: NODE)
    monkeypatch.setattr(stages.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(stages, "READ_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model")))


def row(number: int, *images: bytes, prompt: str | None = "what?") -> dict[str, Any]:
    return {"id": number, "image": list(images), "prompt": prompt}


def planned(folder: Path, *rows: dict[str, Any], size: int = 9) -> tuple[Run, Columns]:
    write_shard(folder / "a.parquet", rows, SCHEMA)
    manifest, schemas = inspect([str(folder)])
    columns = resolve(schemas, ["a"], {}, prompt_given=True)
    shards = {shard.number: shard for shard in manifest.shards}
    return Run(units=tuple(units(manifest, size)), shards=shards, others=()), columns


def task_of(columns: Columns, model: str | None = None, **policy: Any) -> Task:
    engine = engine_settings(made_of(model=model or "demo", retention=0.5), ONE)
    return Task(
        engine=engine,
        rows=RowSettings(
            prompts=("the default",),
            sampling=Sampling(),
            policy=ImagePolicy(**policy),
            seed=0,
        ),
        columns=columns,
        sink=Sink(output="/nowhere", run_id="r", id_type=columns.id_type),
        factory=fake_engine,
        preprocessor=build_preprocessor if model else None,
        stall_s=1.0,
        pauses_s=(0.0,),
    )


def through(run: Run, task: Task, desk: Any) -> Images:
    """What the engine is asked of a run's units, once read and prepared."""
    taker: Any = object.__new__(stages.answer)
    taker._task = task
    out: Images = []
    for block in stages.read(run, task.columns, desk):
        prepared = Block.unpack(stages.prepare(block, task, desk))
        assert prepared.node == NODE and len(prepared.pixels) == 1  # type: ignore[arg-type]
        out += taker._sources(prepared)
    for source, images in out:
        if not isinstance(images, RowError):
            (request,) = requests_of(source, images, task.rows)
            assert isinstance(request, Request) and request.images == tuple(images)
    return out


def test_each_row_has_its_images_or_its_own_error(tmp_path: Path, desk: Any) -> None:
    rows = [
        row(0, png((1, 0, 0))),
        row(1, b"junk"),
        row(2, png((2, 0, 0)), png((3, 0, 0), (5, 4))),
        row(3, prompt=" "),
        row(4),
        row(5, png(), b""),
        row(6, png(size=(90, 90))),
        row(7, png((7, 0, 0)), prompt=None),
    ]
    run, columns = planned(tmp_path, *rows, size=3)
    got = through(run, task_of(columns, max_pixels=1000), desk)
    assert [source.id for source, _ in got] == list(range(8))
    kinds = {s.id: images.kind for s, images in got if isinstance(images, RowError)}
    assert kinds == {
        1: "image_unreadable",
        3: "prompt_missing",
        4: "image_missing",
        5: "image_empty",
        6: "image_oversized",
    }
    reds = {s.id: [i.getpixel((0, 0))[0] for i in images] for s, images in got if s.id not in kinds}
    assert reds == {0: [1], 2: [2, 3], 7: [7]}
    (two,) = (source for source, _ in got if source.id == 2)
    assert (two.num_images, two.size) == (2, (12, 9))
    assert [got[n][0].asks[0].prompt for n in (1, 4)] == ["what?"] * 2 and not desk.notes


def test_rows_for_a_page_have_thumbnails(tmp_path: Path, desk: Any) -> None:
    """Row 2 has the image of row 0, of which nothing is kept for a page."""
    wide = png((7, 0, 0), (1000, 400))
    rows = [row(0, wide), row(1, png()), row(2, wide), row(3, b"junk"), row(4, png(), png())]
    run, columns = planned(tmp_path, *rows)
    task = task_of(columns)
    shown = frozenset({2, 3, 4})
    settings = replace(task.rows, gallery=Sample(kept=frozenset(), wider=shown))
    got = dict(enumerate(through(run, replace(task, rows=settings), desk)))
    files = {n: [Image.open(io.BytesIO(file)) for file in got[n][0].thumbnails] for n in got}
    assert [file.size for file in files[2]] == [(320, 128)] and files[2][0].format == "JPEG"
    assert got[2][0].image_sizes == [(1000, 400)] and not files[1] and not files[3]
    assert [file.size for file in files[4]] == [(12, 9)] * 2
    for n, explain in ((1, False), (2, True), (4, True)):
        (request,) = requests_of(*got[n], settings)
        assert isinstance(request, Request) and request.explain == explain


def test_a_row_that_takes_too_long_is_its_own_error(
    tmp_path: Path, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(cell: Any, *where: Any) -> Any:
        while cell == [b"slow"]:
            pass
        return load_images(cell, *where)

    monkeypatch.setattr(stages, "load_images", slow)
    run, columns = planned(tmp_path, row(0, b"slow"), row(1, png()))
    (_, late), (_, good) = through(run, task_of(columns, row_timeout=0.3), desk)
    assert late.kind == "image_timeout" and len(good) == 1


def test_a_unit_that_cannot_be_read_becomes_errors(tmp_path: Path, desk: Any) -> None:
    run, columns = planned(tmp_path, *(row(n, png()) for n in range(5)), size=3)
    (tmp_path / "a.parquet").unlink()
    got = through(run, task_of(columns), desk)
    assert [images.kind for _, images in got] == ["shard_gone"] * 5
    assert {(source.id, source.asks[0].prompt) for source, _ in got} == {(None, None)}
    assert [note[0] for note in desk.notes] == ["say", "say", "unread", "unread"]
    assert desk.notes[2][1:3] == (Unit(0, 0, 3), "shard_gone")
    nameless = replace(columns, roles={"image": "image"})
    names = [
        (source.id, source.asks[0].prompt) for source, _ in through(run, task_of(nameless), desk)
    ]
    assert names == [(f"a.parquet#{n}", "the default") for n in range(5)]


def test_a_storage_that_is_away_is_no_rows_error(tmp_path: Path, desk: Any) -> None:
    run, columns = planned(tmp_path, row(0, png()))
    (tmp_path / "a.parquet").unlink()
    run = replace(run, others=(str(tmp_path / "b.parquet"),))
    with pytest.raises(Ended):
        list(stages.read(run, columns, desk))
    ((kind, line),) = desk.notes
    assert kind == "user" and "a.parquet: the shard is gone" in line


def test_reading_ends_where_the_run_is_to_stop(
    tmp_path: Path, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio.job.desk.POLL_S", -1.0)
    run, columns = planned(tmp_path, *(row(n, png()) for n in range(9)), size=2)
    desk.stop_after = 2
    assert len(list(stages.read(run, columns, desk))) == 2


def test_pixels_are_those_that_the_engine_would_make(tmp_path: Path, desk: Any, model: str) -> None:
    run, columns = planned(
        tmp_path, row(0, png((9, 80, 200), (50, 31))), row(1, b""), row(2, png(), png(size=(7, 70)))
    )
    prepare = load_preprocessor(model)
    cells = list(stages.read(run, columns, desk))
    decoded = Block.unpack(cells[0]).table.column("image").to_pylist()
    got = through(run, task_of(columns, model), desk)
    assert isinstance(got[1][1], RowError)
    for number in (0, 2):
        images = got[number][1]
        assert all(isinstance(image, ProcessedImage) for image in images)
        pil = load_images(decoded[number], None, ImagePolicy())
        one, other = (prepare(Request(prompt="a", images=tuple(i))) for i in (images, pil))
        assert isinstance(one, Prepared) and isinstance(other, Prepared)
        assert (one.input_ids, one.image_tokens) == (other.input_ids, other.image_tokens)
        made = finished(one.image_inputs, torch.device("cpu"))
        for mine, theirs in zip(made, other.image_inputs, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_images_that_no_preprocessor_takes_are_their_rows_error(
    tmp_path: Path, desk: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(images: Any) -> Any:
        if len(images) > 1:
            raise ZeroDivisionError("no\nmore")
        raise MemoryError

    made = SimpleNamespace(cut=True, process=broken)
    run, columns = planned(tmp_path, row(0, png()), row(1, png(), png()))
    task = replace(task_of(columns), preprocessor=lambda settings: made)
    (_, large), (_, odd) = through(run, task, desk)
    assert large.kind == "image_oversized"
    assert str(odd) == "image_unreadable: ZeroDivisionError: no"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (UserError("no such model"), ("user", "no such model")),
        (OSError("a disk"), ("fail", "no preprocessor: OSError: a disk")),
    ],
)
def test_a_preprocessor_that_cannot_be_made_ends_the_pass(
    tmp_path: Path, desk: Any, error: Exception, note: Any
) -> None:
    def raises(settings: Any) -> Any:
        raise error

    run, columns = planned(tmp_path, row(0, png()))
    with pytest.raises(Ended):
        through(run, replace(task_of(columns), preprocessor=raises), desk)
    assert note in desk.notes


def test_a_mistake_of_ours_is_told_and_raised(
    tmp_path: Path, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("ours")

    run, columns = planned(tmp_path, row(0, png()))
    for owner, name in ((stages.pixel_cell, "pack"), (stages.RunReader, "read")):
        monkeypatch.setattr(owner, name, broken)
        with pytest.raises(KeyError):
            through(run, task_of(columns), desk)
    assert desk.notes == [("fail", f"{stage}: KeyError: 'ours'") for stage in ("prepare", "read")]


def test_an_image_column_alone_goes_through(tmp_path: Path, desk: Any) -> None:
    table = [{"image": [png((n, 0, 0))]} for n in range(3)]
    write_shard(tmp_path / "a.parquet", table, pa.schema([SCHEMA.field("image")]))
    manifest, schemas = inspect([str(tmp_path)])
    columns = resolve(schemas, ["a"], {}, prompt_given=True)
    run = Run(units=(Unit(0, 0, 3),), shards={0: manifest.shards[0]}, others=())
    got = through(run, task_of(columns), desk)
    assert [source.id for source, _ in got] == [f"a.parquet#{n}" for n in range(3)]
    assert [images[0].getpixel((0, 0))[0] for _, images in got] == [0, 1, 2]


def test_a_row_is_described_without_its_images(tmp_path: Path) -> None:
    run, columns = planned(tmp_path, row(7, b"", prompt="why?"), row(8, b"", prompt=None))
    settings = task_of(columns).rows
    for start, said in ((0, (7, "why?")), (1, (8, "the default"))):
        one = replace(run, units=(Unit(0, start, start + 1),))
        found = stages.describe(one, columns, settings)
        assert (found.id, found.asks) == (said[0], (Ask(prompt=said[1]),))
    (tmp_path / "a.parquet").unlink()
    found = stages.describe(one, columns, settings)
    assert (found.id, found.asks) == (None, (Ask(),))
