"""The Ray actor: reads units of rows, answers them with its engine, commits them.

INPUT a shard and a unit of it; OUTPUT one receipt once the unit's files are there. Calls overlap,
so the engine always has the next unit's rows at hand.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from PIL import Image

from trio import openmp as waiting
from trio.engine.request import Result, Sampling
from trio.job.cpus import usable
from trio.job.images.policy import RowError
from trio.job.input.columns import Columns
from trio.job.input.manifest import Shard
from trio.job.input.reader import UnitReader
from trio.job.input.units import Unit
from trio.job.output import totals as sums
from trio.job.output.output_rows import (
    RowSettings,
    Source,
    answers_of,
    identify,
    made_up_id,
    output_row,
    request_of,
    sources,
)
from trio.job.output.sink import Sink
from trio.job.output.totals import SECONDS, Totals
from trio.job.storage import parent
from trio.job.worker import EngineLike, EngineThread, Outcome
from trio.pruning.options import Pruning

BEAT = "beat"
# concurrency group of its own: answered while every other thread of the actor is busy
DECODING = ("decode_rows", "decode_steps")
# sums over steps of the requests that ran together, and of the steps
AS_THEY_ARE = (
    "kv_used_bytes_peak",
    "device_bytes_peak",
    "max_running",
    "batch_tokens",
    "kv_budget_bytes",
)
# peaks, and what an engine's limits are at the time


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an actor makes its engine."""

    model: str
    # hub id, directory, or "demo"
    pruning: Pruning
    text_tower: str | None
    # of the model's encoder: hub id, directory, or "demo"; None where no method needs it
    text_tower_revision: str | None
    # commit of a hub id
    sampling: Sampling
    dtype: str | None
    # None: the engine's default
    batch_tokens: int | None
    max_running: int | None
    gpu_share: float
    # of one GPU, at most 1; 0: on the CPU
    actors_per_node: int
    # that share a node's CPUs
    threads: int | None
    # that decode and prepare; None: by the node's CPUs
    ahead: int
    # rows prepared or in the engine at a time
    revision: str | None = None
    # commit of a hub id
    min_pixels: int | None = None
    max_pixels: int | None = None
    # of an image after resizing; None: the processor's own limits
    system: str | None = None
    # message of all requests; None: the chat template's own
    adapters: tuple[str, ...] = ()
    # families to register, "model_type=module:Class"

    @property
    def gpu(self) -> bool:
        return self.gpu_share > 0


EngineFactory = Callable[[EngineSettings], EngineLike]


def build_engine(settings: EngineSettings) -> EngineLike:
    """The engine on this process's device."""
    # A Ray that was started by other hands need not have it in its environment.
    waiting.passively()
    import torch

    from trio.engine.engine import Engine
    from trio.families.registry import register_named

    if not settings.gpu:
        torch.set_num_threads(engine_threads(settings))
    for adapter in settings.adapters:
        register_named(*adapter.split("=", 1))
    optional = {"batch_tokens": settings.batch_tokens, "max_running": settings.max_running}
    return Engine.from_pretrained(
        settings.model,
        text_tower=settings.text_tower,
        text_tower_revision=settings.text_tower_revision,
        pruning=settings.pruning,
        device="cuda" if settings.gpu else "cpu",
        dtype=getattr(torch, settings.dtype) if settings.dtype else None,
        sampling=settings.sampling,
        memory_share=settings.gpu_share,
        revision=settings.revision,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        system=settings.system,
        **{name: value for name, value in optional.items() if value is not None},
    )


def engine_threads(settings: EngineSettings) -> int:
    """Threads that compute where an engine is on a CPU.

    Of many cores one is left to preparation and Ray, since a parallel region waits for its last
    thread; of two that would be half of them for a twentieth of the work.
    """
    share = usable() // settings.actors_per_node
    return max(1, share if share <= 2 else share - 1)


def prepare_threads(settings: EngineSettings) -> int:
    """Threads that decode and prepare: beside a GPU most of the node's share, else few."""
    share = usable() // settings.actors_per_node
    default = min(16, max(2, share - 1)) if settings.gpu else max(1, share // 4)
    return settings.threads or default


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a committed unit adds up to."""

    unit: Unit
    totals: Totals
    node: str


class EngineActor:
    """An engine and the units it answers."""

    def __init__(
        self,
        engine: EngineSettings,
        rows: RowSettings,
        columns: Columns,
        sink: Sink,
        factory: EngineFactory,
    ) -> None:
        context = ray.get_runtime_context()
        self._name = context.get_actor_id() or f"process-{os.getpid()}"
        self._node = context.get_node_id()
        self._settings, self._rows, self._sink, self._factory = engine, rows, sink, factory
        self._columns, self._reader = columns, UnitReader(columns)
        self._engine: EngineThread | None = None
        self._table: tuple[Unit, pa.Table] | None = None

    def place(self) -> str:
        """The node on which Ray found room."""
        return self._node

    def start(self, actors_here: int) -> dict[str, Any]:
        """Build the engine; returns its memory plan.

        Args:
            actors_here: that share this node's CPUs.

        Raises:
            Exception: whatever the factory raises.
        """
        self._settings = dataclasses.replace(self._settings, actors_per_node=actors_here)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = self._rows.policy.max_pixels
        self._engine = EngineThread(
            partial(self._factory, self._settings),
            threads=prepare_threads(self._settings),
            ahead=self._settings.ahead,
        )
        self._report = _Report(self._engine.counters)
        return self._engine.memory_plan.as_dict()

    @ray.method(concurrency_group=BEAT)
    def beat(self) -> int:
        """A number that grows as long as anything moves in here."""
        return self._engine.activity if self._engine is not None else 0

    def answer(self, shard: Shard, unit: Unit, turn: int) -> Receipt:
        """Answer and commit a unit; ``turn`` counts the calls that read.

        Raises:
            ShardUnreadable: the rows cannot be read, or are not those that were planned.
            EngineDied: the engine failed; this process is of no more use.
            OSError: the output cannot be written.
        """
        table = self._reader.read(shard, unit, turn)
        read = sources(table, unit, shard.path)
        rows = self._outcomes(read, shard)
        return self._commit(unit, rows, sums.merge(map(_totals, rows, read)))

    def answer_row(
        self, shard: Shard, unit: Unit, index: int, refusal: str | None
    ) -> tuple[dict[str, Any], Totals]:
        """One row of a unit and its totals, nothing written; ``refusal`` is the error of a row that
        is not to be touched again."""
        if self._table is None or self._table[0] != unit:
            self._table = (unit, self._reader.read(shard, unit))
        source = sources(self._table[1], unit, shard.path)[index]
        if refusal is None:
            (row,) = self._outcomes([source], shard)
        else:
            with suppress(RowError):
                identify(source, self._rows)
            row = self._row(source, RowError("quarantined", refusal))
        return row, _totals(row, source)

    def commit_rows(self, unit: Unit, rows: Sequence[dict[str, Any]], totals: Totals) -> Receipt:
        """Commit a unit whose rows were answered one by one."""
        return self._commit(unit, rows, totals)

    def refuse(self, shard: Shard, unit: Unit, kind: str, message: str) -> Receipt:
        """Commit a unit that cannot be read as so many errors."""
        nothing = pa.table({"": pa.nulls(unit.stop - unit.start)})
        read = sources(nothing, unit, shard.path)
        if self._columns.id is None:
            for source in read:
                source.id = made_up_id(source, self._rows)
        rows = [self._row(source, RowError(kind, message)) for source in read]
        return self._commit(unit, rows, sums.merge(map(_totals, rows, read)))

    def _outcomes(self, read: Sequence[Source], shard: Shard) -> list[dict[str, Any]]:
        assert self._engine is not None, "start() comes first"
        base = parent(shard.path)
        outcomes = self._engine.answer([partial(request_of, s, base, self._rows) for s in read])
        return [self._row(source, outcome) for source, outcome in zip(read, outcomes, strict=True)]

    def _row(self, source: Source, outcome: Outcome) -> dict[str, Any]:
        if isinstance(outcome, Result):
            flops = outcome.reading_flops, outcome.reading_flops_unpruned
            source.reading_flops = (round(flops[0] or 0), round(flops[1] or 0))
        return output_row(
            source, outcome, actor=self._name, node=self._node, save_kept=self._rows.save_kept
        )

    def _commit(self, unit: Unit, rows: Sequence[dict[str, Any]], totals: Totals) -> Receipt:
        stats, spent = self._report.interval()
        totals += spent
        stats |= {"actor": self._name, "node": self._node, "decode_node": self._node}
        self._sink.commit(unit, rows, stats, totals)
        return Receipt(unit=unit, totals=totals, node=self._node)


def _totals(row: Mapping[str, Any], source: Source) -> Totals:
    with suppress(RowError):  # the row is in error for it
        return sums.of_row(row, answers_of(source), source.reading_flops)
    return sums.of_row(row, [], source.reading_flops)


class _Report:
    """Cuts an actor's growing counters into intervals that add up to them.

    Seconds are what the actor spent since its previous report, on whichever units were under way.
    """

    def __init__(self, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._since = datetime.datetime.now(datetime.UTC)
        self._before: Mapping[str, Any] = {}

    def interval(self) -> tuple[dict[str, Any], Totals]:
        """Columns of ``stats/`` that are no sums, and those that are."""
        with self._lock:
            now, counters = datetime.datetime.now(datetime.UTC), self._counters()
            before, self._before = self._before, counters
            start, self._since = self._since, now
        growing = (*SECONDS, *DECODING, "out_of_memory")
        spent = {n: counters[n] - before.get(n, 0) for n in growing if n in counters}
        rows, steps = (spent.pop(name, 0) for name in DECODING)
        state = counters.get("cuda_graphs")
        return {
            "start": start,
            "end": now,
            "running_mean": rows / steps if steps else None,
            **{name: counters.get(name) for name in AS_THEY_ARE},
        }, Totals(**spent, cuda_graphs={state: 1} if state else {})
