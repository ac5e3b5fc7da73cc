"""A run from checked settings to _SUCCESS: plan on the driver, units through Ray Data, totals.

INPUT a resolved ``JobConfig``; OUTPUT a finished output directory and its summary.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.data.context import DataContext

from trio.engine.plan import describe
from trio.engine.request import Sampling
from trio.pipeline import committed, ids, lease, outdir
from trio.pipeline import fingerprint as prints
from trio.pipeline.actor import EngineFactory, EngineSettings, UnitActor, build_engine
from trio.pipeline.cluster import READ_CPUS, Resources, data_context
from trio.pipeline.columns import Columns, parse_mapping, resolve
from trio.pipeline.config import JobConfig, results
from trio.pipeline.fingerprint import Fingerprint
from trio.pipeline.images import ImagePolicy
from trio.pipeline.manifest import Manifest, expand, inspect
from trio.pipeline.plan import Unit, reads, unit_rows, units
from trio.pipeline.progress import Progress
from trio.pipeline.reader import UnitSource
from trio.pipeline.rows import RowSettings
from trio.pipeline.sink import Sink
from trio.pipeline.storage import Location, locate
from trio.pipeline.summary import summarise
from trio.pipeline.totals import Totals

AHEAD = {False: 96, True: 256}
# rows prepared or in the engine at a time, on a CPU and on a GPU, when --max-running is not given
MAX_CALLS = 16
# units that one actor answers at a time
READS_PER_CPU = 2
SNAPSHOT_S = 60.0
# between two snapshots of what is committed


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known before Ray starts."""

    config: JobConfig
    manifest: Manifest
    columns: Columns
    output: Location
    fingerprint: Fingerprint
    earlier: outdir.Pinned | None

    @property
    def rows(self) -> int:
        limit = self.config.limit
        return self.manifest.rows if limit is None else min(limit, self.manifest.rows)


def plan(config: JobConfig, paths: Sequence[str]) -> Plan:
    """Check input and output; ``paths`` are where the settings' inputs lie.

    Raises:
        UserError: anything in them that keeps the run from making sense.
    """
    assert config.output is not None, "the job chooses an output"
    output = locate(config.output)
    earlier = outdir.earlier(output)
    if earlier is not None and config.rows_per_file is None:
        config = config.replace(rows_per_file=earlier.config.rows_per_file)
    config = prints.pin_revision(config, earlier.config if earlier is not None else None)
    if earlier is not None:
        now = prints.take(config)
        outdir.check_same(earlier, now, expand(paths, output), output.uri)
        manifest, columns = earlier.manifest, earlier.columns
    else:
        manifest, schemas = inspect(paths, output)
        columns = resolve(
            schemas,
            [shard.path for shard in manifest.shards],
            parse_mapping(config.columns or ""),
            prompt_given=config.prompt is not None,
        )
        now = prints.take(config)
    return Plan(
        config=config, manifest=manifest, columns=columns, output=output,
        fingerprint=now, earlier=earlier,
    )  # fmt: skip


def resolve_resources(config: JobConfig, manifest: Manifest, resources: Resources) -> JobConfig:
    """The settings with what the cluster decided filled in."""
    rows = config.rows_per_file
    if rows is None:
        rows = unit_rows(manifest, actors=resources.actors, limit=config.limit)
    return config.replace(
        actors=resources.actors, gpus_per_actor=resources.gpus_per_actor, rows_per_file=rows
    )


def execute(
    run: Plan, resources: Resources, *, factory: EngineFactory = build_engine, label: str = ""
) -> dict[str, Any]:
    """Do what is left of a run and close it; returns its summary.

    Raises:
        UserError: another run holds the output.
        RuntimeError: rows are missing at the end.
        Exception: whatever ended Ray Data's execution.
    """
    with lease.hold(run.output) as held:
        outdir.check_unchanged(run.output, run.earlier)
        return _execute(run, resources, held, factory, label)


def _execute(
    run: Plan, resources: Resources, held: lease.Held, factory: EngineFactory, label: str
) -> dict[str, Any]:
    began = time.time()
    config = resolve_resources(run.config, run.manifest, resources)
    pinned = run.earlier
    if pinned is None:
        pinned = outdir.Pinned(
            run_id=outdir.new_run_id(),
            manifest=run.manifest,
            columns=run.columns,
            fingerprint=dataclasses.replace(run.fingerprint, settings=results(config)),
            ids=ids.scan(run.manifest, run.columns.id, limit=config.limit)
            if run.columns.id is not None
            else None,
            config=config,
        )
        outdir.claim(run.output, pinned)
    else:
        for line in pinned.fingerprint.notices(run.fingerprint):
            print(line, flush=True)
    if pinned.ids is not None and pinned.ids.warning is not None:
        print(pinned.ids.warning, flush=True)
    run_id = pinned.run_id
    assert config.rows_per_file is not None
    wanted = list(units(run.manifest, config.rows_per_file, config.limit))
    committed.sweep(run.output)
    there = committed.read(run.output, wanted, run_id)
    done, before = there.units, there.totals
    todo = [unit for unit in wanted if unit not in done]
    saved_at = time.monotonic()
    memory_plan: dict[str, Any] | None = None
    with Progress(run.rows, before, log_interval_s=config.log_interval, label=label) as progress:
        if todo:
            for receipt in _receipts(run, config, resources, run_id, todo, factory):
                if memory_plan is None:
                    memory_plan = json.loads(receipt["memory_plan"])
                    progress.say(describe(memory_plan))
                progress.add(Totals.from_json(receipt["totals"]), receipt["began_at"])
                held.check()
                done.add(Unit(receipt["shard"], receipt["start"], receipt["stop"]))
                if time.monotonic() - saved_at > SNAPSHOT_S:
                    committed.save(run.output, wanted, done, progress.done, run_id)
                    saved_at = time.monotonic()
    _check_complete(run, wanted, progress.done)
    summary = summarise(
        progress.done,
        run_id=run_id,
        wall_s=time.time() - began,
        done_before=before,
        work_s=progress.work_s,
        resources=resources.describe(),
        memory_plan=memory_plan,
    )
    if pinned.ids is not None:
        summary["duplicate_ids"] = pinned.ids.duplicates
    held.check()
    outdir.close(run.output, summary)
    committed.drop(run.output)
    return summary


def _check_complete(run: Plan, wanted: Sequence[Unit], totals: Totals) -> None:
    missing = sorted(set(wanted) - committed.listed(run.output))
    if missing or totals.rows != run.rows:
        names = ", ".join(unit.name for unit in missing[:3])
        raise RuntimeError(
            f"{totals.rows} of {run.rows} rows were written ({len(missing)} files missing: {names})"
        )


def _receipts(
    run: Plan,
    config: JobConfig,
    resources: Resources,
    run_id: str,
    todo: Sequence[Unit],
    factory: EngineFactory,
) -> Iterator[dict[str, Any]]:
    """Receipts of units as they are committed, in any order."""
    assert config.rows_per_file is not None and config.output is not None
    engine = engine_settings(config, resources)
    rows = RowSettings(
        prompt=config.prompt,
        sampling=engine.sampling,
        policy=ImagePolicy(
            max_pixels=config.max_image_pixels, allow_remote=config.allow_remote_images
        ),
        seed=config.seed,
        save_kept=config.save_kept,
    )
    sink = Sink(
        output=run.output.uri,
        run_id=run_id,
        id_type=run.columns.id_type,
        save_kept=config.save_kept,
    )
    calls = max(2, min(MAX_CALLS, 1 + -(-engine.ahead // config.rows_per_file)))
    parts = reads(run.manifest, todo, parallel=READS_PER_CPU * max(1, int(resources.cpus)))
    with DataContext.current(data_context()):
        dataset = ray.data.read_datasource(
            UnitSource(parts, run.columns), num_cpus=READ_CPUS, override_num_blocks=len(parts)
        ).map_batches(
            UnitActor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(engine, rows, sink, factory),
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor or None,
            compute=ActorPoolStrategy(
                size=min(resources.actors, len(todo)),
                max_tasks_in_flight_per_actor=calls + 1,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield from batch.to_pylist()


def engine_settings(config: JobConfig, resources: Resources) -> EngineSettings:
    """What each actor is told about its engine."""
    gpu = resources.gpus_per_actor > 0
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )
    dtype = {"auto": None if gpu else "float32"}.get(config.dtype, config.dtype)
    return EngineSettings(
        model=config.model,
        pruning=config.pruning(),
        sampling=sampling,
        dtype=dtype,
        batch_tokens=config.batch_tokens,
        max_running=config.max_running,
        gpu=gpu,
        actors_per_node=-(-resources.actors // resources.nodes),
        threads=config.threads,
        ahead=2 * config.max_running if config.max_running else AHEAD[gpu],
        revision=config.revision,
    )
