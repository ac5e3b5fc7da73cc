"""A stand-in for the engine that answers with what it saw, and inputs for the job's tests."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trio.engine.kv_budget import MemoryPlan
from trio.engine.request import Explanation, Prepared, Request, Result
from trio.job.engines.engine_settings import EngineSettings
from trio.job.input.columns import Columns
from trio.job.input.manifest import Manifest, Shard
from trio.job.input.reader import RunReader, ShardUnreadable
from trio.job.input.units import Unit

VISUAL = 16
KEPT = 4
EXPLANATION = Explanation(
    image_tokens=(VISUAL,),
    boxes=np.array(
        [[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y in range(4) for x in range(4)], np.float32
    ),
    saliency=tuple(np.linspace(0, 1, VISUAL, dtype=np.float32) for _ in range(2)),
)
ODD_NAMES = (
    "kind=hot dog",
    "caf\u00e9",
    "cafe\u0301",
    "50%",
    "a%20b",
    "a+b",
    "a#b",
    "why?",
    "a?b=c",
    "a?&",
    "[1]",
    "a*b",
    "a::b",
    "a:b@c",
    "a\\b",
    "\u732b \U0001f408 'x' \"y\" &;,$=~!()",
)
# of directories and files: each letter that some parser of URIs takes for something else

ID_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.int8(),
    pa.uint64(),
    pa.uuid(),
    pa.binary(),
    pa.large_binary(),
    pa.binary(16),
    pa.decimal128(20, 2),
    pa.decimal256(60, 3),
    pa.decimal32(5, 1),
    pa.float64(),
    pa.float16(),
    pa.bool_(),
    pa.date32(),
    pa.time64("ns"),
    pa.timestamp("ns"),
    pa.timestamp("ms", tz="Europe/Berlin"),
    pa.duration("us"),
    pa.bool8(),
)


def id_values(kind: pa.DataType) -> pa.Array:
    """Two different ids and a null."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, id_values(kind.storage_type))
    if pa.types.is_temporal(kind):
        width = pa.int32() if kind.bit_width == 32 else pa.int64()
        return pa.array([1, 12_345_678_901 % 2**20, None], width).cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([Decimal("1.5"), Decimal("-2"), None], kind)
    if "string" in str(kind):
        return pa.array(["a", "b", None], kind)
    if "binary" in str(kind):
        return pa.array([b"\xff" * 16, bytes(16), None], kind)
    return pa.array([1, 0, None]).cast(kind)


class FakeEngine:
    """Answers ``<prompt> <mean colour>``; results leave in an order of their own."""

    def __init__(self, *, width: int = 4, oldest_first: bool = False) -> None:
        self._running: list[tuple[Prepared, str]] = []
        self._said: dict[int, str] = {}
        self._explained: set[int] = set()
        self._next = slice(width) if oldest_first else slice(-width, None)
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    @property
    def memory_plan(self) -> MemoryPlan:
        return MemoryPlan(
            kv_budget_bytes=10_000, max_running=64, request_bytes=500, request_bytes_unpruned=2000
        )

    def prepare(self, request: Request) -> Prepared:
        if "explode" in request.prompt:
            raise RuntimeError("the processor broke")
        colours = [image.resize((1, 1)).getpixel((0, 0)) for image in request.images]
        prepared = Prepared(
            input_ids=tuple(range(len(request.prompt))), id=request.id, sampling=request.sampling
        )
        self._said[id(prepared.input_ids)] = f"{request.prompt} {colours}"
        if request.explain:
            self._explained.add(id(prepared.input_ids))
        return prepared

    def submit(self, prepared: Prepared) -> None:
        self._running.append((prepared, self._said.pop(id(prepared.input_ids))))

    def step(self) -> list[Result]:
        self._steps += 1
        time.sleep(0.001)
        taken = self._running[self._next]
        del self._running[self._next]
        return [self._explain(prepared, _result(prepared, said)) for prepared, said in taken]

    def _explain(self, prepared: Prepared, result: Result) -> Result:
        key = id(prepared.input_ids)
        if key not in self._explained:
            return result
        self._explained.remove(key)
        return replace(result, explanation=EXPLANATION)

    def release(self, prepared: Prepared) -> None: ...

    def stats(self) -> Mapping[str, Any]:
        return {
            "encode_s": 0.25 * self._steps,
            "prefill_s": 0.5 * self._steps,
            "decode_rows": 3 * self._steps,
            "decode_steps": 2 * self._steps,
            "kv_used_bytes_peak": 1000,
            "device_bytes_peak": None,
        }


def _result(prepared: Prepared, said: str) -> Result:
    if len(prepared.input_ids) > 200:
        return Result(id=prepared.id, finish_reason="error", error="too_long: 999 tokens")
    return Result(
        id=prepared.id,
        response=said,
        token_ids=[1, 2, 3],
        logprobs=[-0.5, -1.0, -1.5],
        finish_reason="stop",
        prompt_tokens=len(prepared.input_ids),
        output_tokens=3,
        num_images=1,
        visual_tokens=VISUAL,
        visual_tokens_encoder=VISUAL,
        visual_tokens_stages=[8, KEPT],
        retention=0.25,
        prefill_flops=1e9,
        prefill_flops_unpruned=4e9,
        kv_bytes=100,
        kv_bytes_unpruned=400,
        prefill_s=0.1,
        decode_s=0.2,
        latency_s=0.3,
        kept_tokens=[list(range(8)), list(range(KEPT))],
    )


def fake_engine(settings: EngineSettings) -> list[FakeEngine]:
    return [FakeEngine() for _ in settings.engines]


def png(colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (12, 9)) -> bytes:
    return encoded(Image.new("RGB", size, colour))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_shard(
    path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, row_group: int = 1000
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=row_group)
    return path


def reader_of(manifest: Manifest, columns: Columns) -> RunReader:
    """A reader of a manifest's shards; that it has to try again is a test's failure."""

    def again(shard: Shard, tried: int, fault: ShardUnreadable) -> None:
        raise AssertionError(f"try {tried}: {fault}")

    return RunReader({shard.number: shard for shard in manifest.shards}, columns.roles, again)


def read_unit(manifest: Manifest, columns: Columns, unit: Unit) -> pa.Table:
    table = reader_of(manifest, columns).read(unit)
    assert isinstance(table, pa.Table)
    return table
