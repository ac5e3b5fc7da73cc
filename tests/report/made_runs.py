"""Directories of runs, written by what the job writes them with, without Ray or a model: known
rows, at any state, of any size."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from tests.job.fakes import png, write_shard
from trio.job.input.units import Unit, units
from trio.job.output import output_directory
from trio.job.output.output_directory import Pinned
from trio.job.output.schema import AUDIT, KEPT, LIKELIHOOD, QUESTION, SCORE, row_key
from trio.job.output.sink import Sink
from trio.job.output.summary import of_setting, summarise
from trio.job.output.totals import Totals, merge, of_row
from trio.job.plan import plan
from trio.job.settings import Settings, made_of

EVIL = '</script><script>alert(1)</script><img src="http://evil.example/x.png" onerror="alert(2)">'
BEGAN = datetime.datetime(2026, 3, 4, 12, tzinfo=datetime.UTC)
PATCHES = 8
"""Of an image, along a side."""
VISUAL = PATCHES * PATCHES
STAGES = (32, 16, 6)
ALSO = (KEPT, SCORE, QUESTION, LIKELIHOOD, AUDIT)
GALLERY_SCHEMA = pa.schema(
    [
        ("row", pa.int64()), ("prompt_number", pa.int32()), ("setting", pa.int32()),
        ("why", pa.string()), ("id", pa.string()), ("prompt", pa.string()),
        ("response", pa.string()), ("error", pa.string()), ("answers", pa.list_(pa.string())),
        ("score", pa.float64()), ("audit_response", pa.string()), ("audit_match", pa.bool_()),
        ("finish_reason", pa.string()), ("visual_tokens", pa.int32()), ("retention", pa.float64()),
        ("prompt_tokens", pa.int32()), ("output_tokens", pa.int32()),
        ("thumbnails", pa.list_(pa.binary())),
        ("image_sizes", pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32())]))),
        ("image_tokens", pa.list_(pa.int32())), ("boxes", pa.list_(pa.float32())),
        ("kept_tokens", pa.list_(pa.list_(pa.int32()))),
        ("saliency", pa.list_(pa.list_(pa.float32()))),
    ]
)  # fmt: skip
"""What the page is promised of `OUT/gallery`."""


class MadeRun:
    """A run, begun."""

    def __init__(self, folder: Path, *, rows: int = 24, per_unit: int = 8, **settings: Any) -> None:
        schema = pa.schema([("image", pa.binary()), ("prompt", pa.string())])
        shard = folder / "in.parquet"
        write_shard(shard, [{"image": png(), "prompt": "p"}] * rows, schema)
        self.path = folder / "out"
        values: dict[str, Any] = {"input": (str(shard),), "output": str(self.path)}
        values |= {"rows_per_file": per_unit, "retention": 0.25}
        self.config: Settings = made_of(**values | settings)
        made = plan(self.config, self.config.input.input)
        self.output = made.output
        pinned = Pinned(
            run_id="run1", manifest=made.manifest, columns=made.columns,
            fingerprint=dataclasses.replace(made.fingerprint, settings=self.config.results()),
            ids=None, config=self.config,
        )  # fmt: skip
        output_directory.claim(self.output, pinned)
        self.units = list(units(made.manifest, per_unit))
        self.parts = [Totals()] * len(self.config.compared)
        self.rows: list[dict[str, Any]] = []

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.config.compared]

    def commit(self, count: int | None = None) -> MadeRun:
        """The next units, as engines do."""
        groups = {name for name in ALSO if name not in (AUDIT, LIKELIHOOD, QUESTION)}
        if self.config.output.audit:
            groups.add(AUDIT)
        also = [name for name in ALSO if name in groups]
        sink = Sink(
            output=str(self.path), run_id="run1", id_type=pa.string(), also=tuple(also),
            settings=len(self.names),
        )  # fmt: skip
        for unit in self.units[:count]:
            own = [
                row_of(unit.shard, index, setting, name, audited=AUDIT in groups)
                for index in range(unit.start, unit.stop)
                for setting, name in enumerate(self.names)
            ]
            parts = [
                merge(of_row(r, (), reading=_reading(r)) for r in own if r["setting"] == setting)
                for setting in range(len(self.names))
            ]
            parts = [
                dataclasses.replace(
                    one, prepare_s=1.5, preprocess_wait_s=0.5, encode_s=0.5, prefill_s=2.0,
                    prune_s=0.5, decode_s=4.0,
                )
                for one in parts
            ]  # fmt: skip
            sink.commit(unit, own, [stats_of(unit)] * len(parts), parts, print)
            self.parts = [a + b for a, b in zip(self.parts, parts, strict=True)]
            self.rows += own
        self.units = self.units[len(self.units) if count is None else count :]
        return self

    def summary(self, **more: Any) -> dict[str, Any]:
        settings = [
            of_setting(part, name, engines=2)
            for part, name in zip(self.parts, self.names, strict=True)
        ]
        made = summarise(
            merge(self.parts), name=self.config.pruning.name, run_id="run1", wall_s=30.0,
            done_before=Totals(), work_s=20.0, resources="2 engines",
            settings=settings if len(settings) > 1 else (),
        )  # fmt: skip
        return made | more

    def say(self, **more: Any) -> MadeRun:
        """A summary while the run goes on, or after its end."""
        (self.path / "summary.json").write_text(json.dumps(self.summary(**more)))
        return self

    def close(self, metrics: Mapping[str, Any] | None = None, **more: Any) -> MadeRun:
        also = {} if metrics is None else {"metrics.json": json.dumps(metrics)}
        output_directory.close(self.output, self.summary(**more), also=also)
        return self

    def gallery(self, most: int = 12, patches: int = PATCHES) -> MadeRun:
        """Of the first rows that are written."""
        rows = [gallery_row(row, patches) for row in self.rows if row["row"] < most]
        path = self.path / "gallery" / "000000-0000000000-0000000008.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, GALLERY_SCHEMA), path)
        return self


def _reading(row: Mapping[str, Any]) -> tuple[int, int]:
    """With an encoder of 2 GFLOP."""
    if row["error"] is not None:
        return 0, 0
    return row["prefill_flops"] + 2 * 10**9, row["prefill_flops_unpruned"] + 2 * 10**9


def row_of(
    shard: int, index: int, setting: int, name: str, *, audited: bool = False
) -> dict[str, Any]:
    """A row whose figures follow from its number."""
    row: dict[str, Any] = {
        "row": row_key(shard, index), "id": f"id-{index}", "prompt": f"What is in image {index} ?",
        "num_images": 1, "image_width": 320, "image_height": 240, "actor": f"e{index % 2}",
        "node": "n1", "finished_at": BEGAN, "prompt_number": 0, "setting": setting,
        "picture": f"p{index}",
    }  # fmt: skip
    if index % 12 == 5:
        error = "image_invalid: not an image <b>at all</b>"
        return row | {"finish_reason": "error", "error": error, "response": None}
    pruned = name != "unpruned"
    changed = pruned and index % 4 == 1
    response = EVIL if index == 3 else f"a cat, number {index}"
    row |= {
        "response": f"a dog, number {index}" if changed else response, "finish_reason": "stop",
        "error": None, "visual_tokens": VISUAL, "visual_tokens_encoder": VISUAL,
        "visual_tokens_stages": list(STAGES) if pruned else [],
        "retention": 0.25 + 0.01 * (index % 3) if pruned else 1.0,
        "prompt_tokens": VISUAL + 6 + index % 5, "output_tokens": 4 + index,
        "prefill_flops": 10**9 if pruned else 4 * 10**9, "prefill_flops_unpruned": 4 * 10**9,
        "kv_bytes": 1000 if pruned else 4000, "kv_bytes_unpruned": 4000, "prefill_s": 0.25,
        "decode_s": 0.5, "latency_s": 0.5 + 0.1 * index,
        "logprob_mean": math.log(0.55 if changed else 0.95), "score": float(not changed),
        "kept_tokens": kept_of(index) if pruned else [],
    }  # fmt: skip
    if audited and index % 2:
        row |= {"audit_response": response, "audit_match": not changed, "audit_overlap": 0.9}
    return row


def kept_of(index: int, patches: int = PATCHES) -> list[list[int]]:
    """Of each stage the tokens nearest to a spot that moves with the row."""
    visual = patches * patches
    far = np.array(
        [(n // patches - 2 - index % 4) ** 2 + (n % patches - 3) ** 2 for n in range(visual)]
    )
    order = np.argsort(far, kind="stable")
    return [sorted(order[: visual * keep // VISUAL].tolist()) for keep in STAGES]


def stats_of(unit: Unit) -> dict[str, Any]:
    """Of an engine that takes two seconds for a row."""
    start = BEGAN + datetime.timedelta(seconds=2 * unit.start)
    end = BEGAN + datetime.timedelta(seconds=2 * unit.stop)
    return {"actor": f"e{unit.start // 8 % 2}", "node": "n1", "start": start, "end": end}


def gallery_row(row: Mapping[str, Any], patches: int = PATCHES) -> dict[str, Any]:
    index, visual = row["row"], patches * patches
    out = {name: row[name] for name in GALLERY_SCHEMA.names if name in row}
    out["why"] = "error" if row["error"] is not None else "sample" if index % 2 else "disagreement"
    if row["error"] is not None:
        return out | {"thumbnails": [], "image_sizes": []}
    ticks = np.linspace(0, 1, patches + 1)
    boxes = np.stack(
        [
            np.tile(ticks[:-1], patches), np.repeat(ticks[:-1], patches),
            np.tile(ticks[1:], patches), np.repeat(ticks[1:], patches),
        ],
        axis=1,
    )  # fmt: skip
    boxes[-1] = np.nan  # a token that shows no place
    kept = kept_of(index, patches) if row["kept_tokens"] else []
    saliency = [np.linspace(0, 1, visual).tolist() for _ in kept]
    for scores, before in zip(saliency[1:], kept, strict=False):
        for token in set(range(visual)) - set(before):
            scores[token] = math.nan
    return out | {
        "answers": ["a cat"], "thumbnails": [thumbnail(index)],
        "image_sizes": [{"width": 1280, "height": 960}], "visual_tokens": visual,
        "image_tokens": [visual], "boxes": boxes.ravel().tolist(), "kept_tokens": kept,
        "saliency": saliency,
    }  # fmt: skip


def thumbnail(index: int) -> bytes:
    """A landscape with something round in it."""
    image = Image.new("RGB", (320, 240), (120, 165, 210))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 150, 320, 240), fill=(86, 124, 72))
    x, y = 140, 60 + 30 * (index % 4)
    draw.ellipse((x - 34, y - 34, x + 34, y + 34), fill=(222, 110, 60))
    draw.ellipse((x - 12, y - 14, x + 2, y), fill=(250, 240, 220))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def spoil(path: Path) -> None:
    """Its first pages; the footer stays whole."""
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)


def metrics_of(names: Sequence[str]) -> dict[str, Any]:
    """As `jobs/vqa.py --compare` writes it."""
    figure = {"value": 0.8125, "interval": [0.7, 0.9], "interval_by": "wilson"}
    comparison = {
        "headline": {
            "unpruned": 0.8333, "pruned": 0.8125, "relative": 0.975,
            "relative_interval": [0.93, 1.0], "difference_points": -2.1,
            "difference_points_interval": [-5.0, 0.5], "only_unpruned": 3, "only_pruned": 2,
        },
        "agreement": {"value": 0.75, "interval": [0.6, 0.85]},
    }  # fmt: skip
    return {
        "mode": "generate", "metric": "pope",
        "settings": [
            {
                "setting": number, "name": name, "metric": "pope", "headline": "accuracy",
                "figures": {"accuracy": figure, "yes_ratio": figure},
                "groups": {"kind": {"rare": {"n": 7, "figures": {"accuracy": figure}}}},
            }
            | ({} if name == "unpruned" else {"comparison": comparison})
            for number, name in enumerate(names)
        ],
    }  # fmt: skip


def write_many(folder: Path, rows: int, per_file: int = 100_000) -> Path:
    """A finished run of so many rows, in files as they are after they were put together.

    Answers are as long as real ones, and all columns of a run with a comparison by scores are
    there. Written straight as tables: the job's own way takes minutes for millions of rows.
    """
    run = MadeRun(folder, rows=8)
    run.commit().close()
    first = pq.read_table(next((run.path / "rows").glob("*.parquet")))
    for path in (run.path / "rows").glob("*.parquet"):
        path.unlink()
    for place, table in enumerate(_tables(first.schema, rows, per_file)):
        start, stop = place * per_file, min(rows, (place + 1) * per_file)
        name = Unit(0, start, stop).name
        pq.write_table(table, run.path / "rows" / name, row_group_size=25_000)
    _write_stats(run, rows, per_file)
    return run.path


def _tables(schema: pa.Schema, rows: int, per_file: int) -> Iterator[pa.Table]:
    words = np.array(["a", "dog", "cat", "on", "the", "red", "table", "beside", "two", "people"])
    for start in range(0, rows, per_file):
        count = min(per_file, rows - start)
        random = np.random.default_rng(start)
        visual = random.integers(200, 2880, count)
        stages = np.stack([visual // 3, visual // 6, visual // 20], axis=1)
        said = [" ".join(line) for line in words[random.integers(0, 10, (count, 24))]]
        failed = random.random(count) < 0.003
        kinds = np.array(["image_missing: there is none", "too_long: 9000 tokens"])
        tokens = random.integers(5, 200, count)
        values: dict[str, Any] = {
            "row": np.arange(start, start + count), "id": [f"id-{n}" for n in range(count)],
            "prompt": [f"Describe image {n} in a few words." for n in range(count)],
            "response": pa.array(said, mask=failed),
            "finish_reason": np.where(failed, "error", "stop"),
            "error": pa.array(kinds[random.integers(0, 2, count)], mask=~failed),
            "visual_tokens": visual, "visual_tokens_encoder": visual,
            "visual_tokens_stages": pa.ListArray.from_arrays(
                np.arange(0, 3 * count + 1, 3), stages.ravel().astype(np.int32)
            ),
            "retention": random.normal(0.11, 0.01, count).clip(0.01, 1),
            "prompt_tokens": visual + 20, "output_tokens": tokens,
            "prefill_flops": np.full(count, 10**12), "kv_bytes": np.full(count, 10**7),
            "prefill_flops_unpruned": np.full(count, 5 * 10**12),
            "kv_bytes_unpruned": np.full(count, 5 * 10**7),
            "latency_s": random.lognormal(0, 0.6, count), "prefill_s": random.random(count),
            "decode_s": random.random(count), "logprob_mean": -random.random(count),
            "score": random.integers(0, 2, count).astype(float),
            "actor": np.where(random.random(count) < 0.5, "e0", "e1"),
            "node": np.full(count, "n1"), "finished_at": pa.array([BEGAN] * count),
            "prompt_number": np.zeros(count), "setting": np.zeros(count),
        }  # fmt: skip
        columns = [
            pa.array(values[field.name]).cast(field.type)
            if field.name in values
            else pa.nulls(count, field.type)
            for field in schema
        ]
        yield pa.Table.from_arrays(columns, schema=schema)


def _write_stats(run: MadeRun, rows: int, per_file: int) -> None:
    """A line for each unit of 128 rows, under the names of the files of rows."""
    stats = pq.read_table(next((run.path / "stats").glob("*.parquet")))
    for path in (run.path / "stats").glob("*.parquet"):
        path.unlink()
    (line,) = stats.to_pylist()
    lines = []
    for start in range(0, rows, 128):
        stop = min(rows, start + 128)
        lines.append(
            line
            | {
                "unit": Unit(0, start, stop).stem, "rows": stop - start, "inputs": stop - start,
                "images": stop - start, "actor": f"e{start // 128 % 12}",
                "start": BEGAN + datetime.timedelta(seconds=start / 500),
                "end": BEGAN + datetime.timedelta(seconds=(start + 12 * 128) / 500),
            }
        )  # fmt: skip
    record = []
    for place, start in enumerate(range(0, rows, per_file)):
        own = [one for one in lines if start <= int(one["unit"].split("-")[1]) < start + per_file]
        name = f"0-{place:05d}.parquet"
        for folder in ("rows", "stats"):
            record += [{"folder": folder, "file": name, "unit": one["unit"]} for one in own]
        pq.write_table(pa.Table.from_pylist(own, stats.schema), run.path / "stats" / name)
        rows_file = Unit(0, start, min(rows, start + per_file)).name
        (run.path / "rows" / rows_file).rename(run.path / "rows" / name)
    kinds = pa.schema([(name, pa.string()) for name in ("folder", "file", "unit")])
    pq.write_table(pa.Table.from_pylist(record, kinds), run.path / "files.parquet")
