"""The Ray Data actor: units in, committed files and one receipt each out.

INPUT one block with one unit (``reader.BLOCK``); OUTPUT one block with one receipt
(``RECEIPT``). Calls overlap, so the engine always has the next unit's rows at hand; each call
returns once its own unit is committed.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from PIL import Image

from trio.config import Pruning
from trio.engine.request import Sampling
from trio.pipeline import totals as sums
from trio.pipeline.plan import Unit
from trio.pipeline.reader import decode
from trio.pipeline.rows import RowSettings, Source, answers_of, output_row, request_of, sources
from trio.pipeline.sink import Sink
from trio.pipeline.storage import Location, locate
from trio.pipeline.totals import Totals
from trio.pipeline.worker import EngineLike, EngineThread

RECEIPT = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("actor", pa.string()),
        pa.field("began_at", pa.float64(), metadata={"unit": "seconds since 1970"}),
        pa.field("totals", pa.string()),
        pa.field("memory_plan", pa.string()),
    ]
)
SECONDS = ("preprocess_wait_s", "encode_s", "prefill_s", "prune_s", "decode_s", "idle_s")
DECODING = ("decode_rows", "decode_steps")
# sums over steps of the requests that ran together, and of the steps
PEAKS = ("kv_used_bytes_peak", "device_bytes_peak")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an actor makes its engine."""

    model: str
    # hub id, directory, or "demo"
    pruning: Pruning
    sampling: Sampling
    dtype: str | None
    # None: the engine's default
    batch_tokens: int | None
    max_running: int | None
    gpu: bool
    actors_per_node: int
    # that share a node's CPUs
    threads: int | None
    # that decode and prepare; None: by the node's CPUs
    ahead: int
    # rows prepared or in the engine at a time
    revision: str | None = None
    # commit of a hub id


EngineFactory = Callable[[EngineSettings], EngineLike]


def build_engine(settings: EngineSettings) -> EngineLike:
    """The engine on this process's device."""
    import torch

    from trio.engine.engine import Engine

    if not settings.gpu:
        torch.set_num_threads(engine_threads(settings))
    optional = {"batch_tokens": settings.batch_tokens, "max_running": settings.max_running}
    return Engine.from_pretrained(
        model_directory(settings.model),
        pruning=settings.pruning,
        device="cuda" if settings.gpu else "cpu",
        dtype=getattr(torch, settings.dtype) if settings.dtype else None,
        sampling=settings.sampling,
        revision=settings.revision,
        **{name: value for name, value in optional.items() if value is not None},
    )


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_threads(settings: EngineSettings) -> int:
    """Threads that compute where an engine is on a CPU.

    Of many cores one is left to preparation and Ray, since a parallel region waits for its last
    thread; of two that would be half of them for a twentieth of the work.
    """
    share = cpus() // settings.actors_per_node
    return max(1, share if share <= 2 else share - 1)


def prepare_threads(settings: EngineSettings) -> int:
    """Threads that decode and prepare: beside a GPU most of the node's share, else few."""
    share = cpus() // settings.actors_per_node
    default = min(16, max(2, share - 1)) if settings.gpu else max(1, share // 4)
    return settings.threads or default


def model_directory(model: str) -> str:
    """Where a model lies on this node; ``demo`` is inside the package."""
    if model != "demo":
        return model
    import trio

    return os.path.join(os.path.dirname(os.path.abspath(trio.__file__)), "demo", "model")


class UnitActor:
    """An engine and the units it answers."""

    def __init__(
        self,
        engine: EngineSettings,
        rows: RowSettings,
        sink: Sink,
        factory: EngineFactory = build_engine,
    ) -> None:
        context = ray.get_runtime_context()
        self._name = context.get_actor_id() or f"process-{os.getpid()}"
        self._node = context.get_node_id()
        self._rows, self._sink = rows, sink
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = rows.policy.max_pixels
        self._engine = EngineThread(
            partial(factory, engine), threads=prepare_threads(engine), ahead=engine.ahead
        )
        self._report = _Report(self._engine.counters)

    def __call__(self, block: pa.Table) -> pa.Table:
        receipts = [self._unit(block, index) for index in range(block.num_rows)]
        return pa.Table.from_pylist(receipts, schema=RECEIPT)

    def _unit(self, block: pa.Table, index: int) -> dict[str, Any]:
        began_at = datetime.datetime.now(datetime.UTC).timestamp()
        row = block.select(["shard", "start", "stop", "path"]).slice(index, 1).to_pylist()[0]
        unit = Unit(row["shard"], row["start"], row["stop"])
        table = decode(block.column("payload")[index].as_buffer())
        read = sources(table, unit, row["path"])
        base = parent(row["path"])
        readers = [partial(request_of, source, base, self._rows) for source in read]
        outcomes = self._engine.answer(readers)
        done = [
            output_row(
                source, outcome, actor=self._name, node=self._node, save_kept=self._rows.save_kept
            )
            for source, outcome in zip(read, outcomes, strict=True)
        ]
        totals = sums.merge(map(_totals, done, read))
        stats = self._report.interval(totals) | {"actor": self._name, "node": self._node}
        self._sink.commit(unit, done, stats, totals)
        return {
            "shard": unit.shard,
            "start": unit.start,
            "stop": unit.stop,
            "actor": self._name,
            "began_at": began_at,
            "totals": totals.to_json(),
            "memory_plan": json.dumps(self._engine.memory_plan.as_dict()),
        }


def _totals(row: Mapping[str, Any], source: Source) -> Totals:
    return sums.of_row(row, answers_of(source))


def parent(path: str) -> Location:
    """Directory of a shard: what relative image paths start from."""
    location = locate(path)
    return location.at(location.path.rpartition("/")[0])


class _Report:
    """Cuts an actor's growing counters into intervals that add up to them.

    Counts of images and tokens are the unit's own; seconds are what the actor spent since its
    previous report, on whichever units were under way.
    """

    def __init__(self, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._since = datetime.datetime.now(datetime.UTC)
        self._before: Mapping[str, Any] = {}

    def interval(self, totals: Totals) -> dict[str, Any]:
        with self._lock:
            now, counters = datetime.datetime.now(datetime.UTC), self._counters()
            before, self._before = self._before, counters
            start, self._since = self._since, now
        spent = {n: counters[n] - before.get(n, 0) for n in (*SECONDS, *DECODING) if n in counters}
        rows, steps = (spent.pop(name, 0) for name in DECODING)
        return {
            "start": start,
            "end": now,
            "images": totals.images,
            "prompt_tokens": totals.prompt_tokens,
            "output_tokens": totals.output_tokens,
            "running_mean": rows / steps if steps else None,
            **{name: counters.get(name) for name in PEAKS},
            **spent,
        }
