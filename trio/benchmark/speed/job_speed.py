"""Overhead of the Ray job around its engine.

Two figures. `job_vs_engine`: images per second of the whole job (reading Parquet, Ray, decoding,
preparing, answering, writing rows) over those of the engine alone on the same rows and the same
cores. `pipeline_rows_per_s`: rows per second of a job whose engine answers at once, which is what
one job can do at most however fast its engine is.

A job's time goes from when its engine was ready to the last receipt, as in its
summary.json: starting Ray and loading the model are shown beside it. What was read while the engine
loaded is therefore not in it, so a run must be long against that; all else is. The engine alone is
`Engine.generate` on requests whose images are decoded already: preparing them is in its time,
reading and decoding are not. It runs in a Ray worker of its own, whose priority and environment are
those of the job's, after a warm-up that the job does not get. On a CPU it is timed with the threads
that the job gives its engine, with half as many as there are CPUs and with as many; the fastest
counts, whatever the job chose. Threads that wait for each other suffer more than others from what
else the machine does: read the ranges, and `load` among the conditions, before a median.

`job_vs_prepared` is the ratio to an engine whose requests were prepared in advance: how busy the
job keeps its device. On a CPU it cannot reach 1, since the same cores prepare.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from trio.benchmark.speed.instant import instant_engines
from trio.demo.scenes import make_scene
from trio.demo.shard import write_shard
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request
from trio.job import runner
from trio.job.command import check_model
from trio.job.engines.engine_settings import EngineSettings, build_engines, engine_threads
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy
from trio.job.nodes import cluster
from trio.job.nodes.cluster import Resources
from trio.job.nodes.cpus import usable
from trio.job.plan import plan as plan_of
from trio.job.runner import Makers
from trio.job.settings import Settings, made_of
from trio.tables import aligned
from trio.version import of_library

SCENES = 64
"""Different images among those of the pipeline's own rows."""
ROW_GROUP = 100
WARM_UP = 16
PROMPT = "Describe the image in one sentence."
INSTANTLY = Makers(engine=instant_engines, preprocessor=None)
JOB, PREPARED, INSTANT = "job", "engine, prepared", "job, instant engine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """rows: of the job with the real engine, two for each scene of the demo. instant_rows: of the
    job whose engine answers at once. image_size: width and height in pixels of the latter's JPEG
    images."""

    model: str
    retention: float
    rows: int
    instant_rows: int
    image_size: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One subject in one round: rows, their seconds, and seconds of start-up (None: not timed)."""

    rows: int
    work_s: float
    start_s: float | None = None

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.work_s


def surroundings() -> dict[str, Any]:
    """CPUs, processes that wanted one in the last minute, and versions besides the model's."""
    names = ("ray", "pyarrow", "pillow")
    return {
        "cpus": usable(),
        "load": round(os.getloadavg()[0], 1),
        **{name: of_library(name) for name in names},
    }


def check(workload: Workload) -> None:
    """Raise UserError, before anything starts, where no job could run."""
    check_model(workload.model)
    job_config(workload, Path("scenes.parquet"))


def measure(workload: Workload, rounds: int) -> Iterator[dict[str, Run]]:
    """The rounds, each with a run of every subject, one after the other.

    Raises:
        UserError: no such model, or it does not run here.
    """
    attached = cluster.start()
    try:
        with TemporaryDirectory(prefix="trio-benchmark-") as directory:
            yield from _rounds(Path(directory), workload, rounds, attached)
    finally:
        cluster.stop(attached)


def _rounds(
    base: Path, workload: Workload, rounds: int, attached: bool
) -> Iterator[dict[str, Run]]:
    scenes, small = base / "scenes.parquet", base / "small.parquet"
    write_shard(scenes, scenes=-(-workload.rows // 2), seed=workload.seed)
    write_small(small, workload.instant_rows, workload.image_size, workload.seed)
    real = job_config(workload, scenes).replace(limit=workload.rows)
    instant = job_config(workload, small)
    resources = cluster.fit(real, attached=attached)
    settings = runner.engine_settings(real, resources)
    for number in range(rounds):
        label = f"round {number + 1}/{rounds}"
        output = base / f"{JOB}-{number}"
        runs = {JOB: _job(real, output, resources, Makers(), f"{label}, {JOB}")}
        runs |= _alone(settings, resources, scenes, workload.rows)
        output = base / f"{INSTANT}-{number}"
        runs[INSTANT] = _job(instant, output, resources, INSTANTLY, f"{label}, {INSTANT}")
        yield runs


def job_config(workload: Workload, path: Path) -> Settings:
    """The job's settings, as `caption.py` would choose them, for one engine."""
    return made_of(
        input=(str(path),),
        model=workload.model,
        retention=workload.retention,
        prompt=(PROMPT,),
        actors=1,
        log_interval=3600.0,
    )


def write_small(path: Path, rows: int, size: int, seed: int) -> None:
    """A shard of `rows` scenes, shrunk to `size` pixels a side: JPEG bytes, an id and a prompt."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(min(rows, SCENES)):
        stream = io.BytesIO()
        make_scene(rng, "heldout").image.resize((size, size)).save(stream, "JPEG", quality=92)
        images.append(stream.getvalue())
    table = pa.table(
        {
            "id": [f"small-{number:08d}" for number in range(rows)],
            "image": [images[number % len(images)] for number in range(rows)],
            "prompt": [PROMPT] * rows,
        }
    )
    pq.write_table(table, path, row_group_size=ROW_GROUP)


def _job(config: Settings, output: Path, resources: Resources, makers: Makers, label: str) -> Run:
    plan = plan_of(config.replace(output=str(output)), config.input.input)
    summary = runner.execute(plan, resources, makers=makers, label=label)
    assert not summary["errors"], summary["error_kinds"]
    work_s = summary["work_s"]
    return Run(rows=summary["rows"], work_s=work_s, start_s=summary["wall_s"] - work_s)


def _alone(settings: EngineSettings, resources: Resources, path: Path, rows: int) -> dict[str, Run]:
    """The engine in a worker of its own, which is gone before the next job wants the device."""
    # Ray's types do not know what its wrappers add to a class.
    remote: Any = ray.remote(EngineAlone)
    needs = {"num_cpus": resources.cpus_per_actor, "num_gpus": resources.gpus_per_actor or None}
    worker = remote.options(**needs).remote(settings, str(path), rows)
    try:
        return dict(ray.get(worker.measure.remote()))
    finally:
        ray.kill(worker)


class EngineAlone:
    """The job's engine, and the job's rows as requests with decoded images."""

    def __init__(self, settings: EngineSettings, path: str, rows: int) -> None:
        (engine,) = build_engines(settings)
        assert isinstance(engine, Engine)
        self._engine = engine
        chosen = {engine_threads(settings), max(1, usable() // 2), usable()}
        self._threads = [usable()] if settings.gpu else sorted(chosen)
        self._requests = [
            Request(
                id=row["id"],
                prompt=row["prompt"],
                images=tuple(load_images(row["image"], None, ImagePolicy())),
            )
            for row in pq.read_table(path).slice(0, rows).to_pylist()
        ]

    def measure(self) -> dict[str, Run]:
        """A run with each number of threads; then, with the best, one of prepared requests."""
        self._time(self._requests[:WARM_UP], self._threads[-1])
        runs = {threads: self._time(self._requests, threads) for threads in self._threads}
        best = max(runs, key=lambda threads: runs[threads].rows_per_s)
        prepared = [self._prepared(request) for request in self._requests]
        named = {engine_name(threads): run for threads, run in runs.items()}
        return named | {PREPARED: self._time(prepared, best)}

    def _prepared(self, request: Request) -> Prepared:
        prepared = self._engine.prepare(request)
        assert isinstance(prepared, Prepared), prepared.error
        return prepared

    def _time(self, requests: Sequence[Request | Prepared], threads: int) -> Run:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        results = list(self._engine.generate(requests))
        took = time.perf_counter() - began
        failed = next((result.error for result in results if result.error), None)
        assert failed is None and len(results) == len(requests), failed
        return Run(rows=len(results), work_s=took)


def engine_name(threads: int) -> str:
    """Of the engine alone with so many threads."""
    return f"engine, {threads} thread{'s' if threads > 1 else ''}"


def summary(rounds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Medians with their spread; the keys of the JSON file."""
    names = list(rounds[0])
    alone = [name for name in names if name not in (JOB, PREPARED, INSTANT)]

    def fastest(runs: dict[str, Run]) -> float:
        return max(runs[name].rows_per_s for name in alone)

    def figure(name: str, of: Callable[[dict[str, Run]], float]) -> dict[str, Any]:
        values = [of(runs) for runs in rounds]
        return {name: statistics.median(values), f"{name}_range": (min(values), max(values))}

    return {
        **figure("job_vs_engine", lambda runs: runs[JOB].rows_per_s / fastest(runs)),
        **figure("job_vs_prepared", lambda r: r[JOB].rows_per_s / r[PREPARED].rows_per_s),
        **figure("pipeline_rows_per_s", lambda runs: runs[INSTANT].rows_per_s),
        "rows": [_row(name, [runs[name] for runs in rounds]) for name in names],
    }


def _row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    rates = [run.rows_per_s for run in runs]
    starts = [run.start_s for run in runs if run.start_s is not None]
    return {
        "name": name,
        "rows": runs[0].rows,
        "rows_per_s": statistics.median(rates),
        "rows_per_s_range": (min(rates), max(rates)),
        "work_s": statistics.median(run.work_s for run in runs),
        "start_s": statistics.median(starts) if starts else None,
    }


def table(summary: dict[str, Any]) -> str:
    """The rows as aligned text, then the figures with their ranges."""
    lines = [["", "rows", "rows/s", "(range)", "work s", "start-up s"]]
    for row in summary["rows"]:
        low, high = row["rows_per_s_range"]
        lines.append(
            [
                row["name"],
                str(row["rows"]),
                f"{row['rows_per_s']:.1f}",
                f"{low:.1f}-{high:.1f}",
                f"{row['work_s']:.2f}",
                "" if row["start_s"] is None else f"{row['start_s']:.2f}",
            ]
        )
    text = [aligned(lines)]
    for name in ("job_vs_engine", "job_vs_prepared", "pipeline_rows_per_s"):
        low, high = summary[f"{name}_range"]
        text.append(f"{name} {summary[name]:.3f} ({low:.3f}-{high:.3f})")
    return "\n".join(text)
