"""A run from checked settings to _SUCCESS: plan on the driver, units to actors, totals.

INPUT a resolved ``Settings``; OUTPUT a finished output directory and its summary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from trio.engine.decoding.generation_rules import Rules
from trio.engine.kv_budget import describe
from trio.errors import JobFailed
from trio.job import cluster
from trio.job.actor import EngineFactory, EngineSettings, Receipt, build_engine
from trio.job.cluster import Resources
from trio.job.dispatch import LEAST_ROOM_S, ROOM_S, ActorOptions, Dispatcher, Limits, Stop
from trio.job.input import ids
from trio.job.input.columns import Columns, parse_mapping, resolve
from trio.job.input.manifest import Manifest, expand, inspect, tell
from trio.job.input.units import Unit, runs, unit_rows, units
from trio.job.output import output_directory
from trio.job.output.output_rows import RowSettings
from trio.job.output.progress import Progress
from trio.job.output.sink import ROWS, Sink
from trio.job.output.summary import summarise
from trio.job.output.totals import Totals
from trio.job.placement import Need
from trio.job.resume import committed, decoding_rules, lease
from trio.job.resume import fingerprint as prints
from trio.job.resume.checkpoint_defaults import pruning_resolved
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import SCORED, Settings
from trio.job.storage import Location, exists, locate
from trio.job.work import WorkQueue

AHEAD = {False: 96, True: 256}
# rows prepared or in the engine at a time, on a CPU and on a GPU, when --max-running is not given
MAX_CALLS = 16
# units that one actor answers at a time
RUNS_PER_ACTOR = 4
SHARED_TRIES, SHARED_PAUSE_S = 5, 2.0
# until a shared file system shows what another node has written
ENOUGH_ROWS = 500
# of this attempt, before a run may be ended for its errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known before Ray starts."""

    config: Settings
    manifest: Manifest
    columns: Columns
    output: Location
    fingerprint: Fingerprint
    earlier: output_directory.Pinned | None
    decoding: Rules | None = None
    # of the model; None: they cannot be read here

    @property
    def rows(self) -> int:
        limit = self.config.input.limit
        return self.manifest.rows if limit is None else min(limit, self.manifest.rows)


def plan(
    config: Settings,
    paths: Sequence[str],
    *,
    around: Location | None = None,
    say: Callable[[str], None] = tell,
) -> Plan:
    """Check input and output.

    Args:
        config: the settings.
        paths: where their inputs lie.
        around: the directory around this run's, if another run keeps its output there: no input.
        say: told of files that are left out.

    Raises:
        UserError: anything in them that keeps the run from making sense.
    """
    assert config.output.output is not None, "the job chooses an output"
    output = locate(config.output.output)
    ours = around or output
    earlier = output_directory.earlier(output)
    config = _settled(config, earlier)
    now = prints.take(config)
    if earlier is not None:
        output_directory.check_same(earlier, now, expand(paths, ours, say), output.uri)
        manifest, columns = earlier.manifest, earlier.columns
    else:
        manifest, schemas = inspect(paths, ours, say)
        columns = resolve(
            schemas,
            [shard.path for shard in manifest.shards],
            parse_mapping(config.input.columns or ""),
            prompt_given=config.input.prompt is not None,
            scored=config.output.score in SCORED,
        )
    return Plan(
        config=config, manifest=manifest, columns=columns, output=output,
        fingerprint=now, earlier=earlier, decoding=decoding_rules.read(config),
    )  # fmt: skip


def _settled(config: Settings, earlier: output_directory.Pinned | None) -> Settings:
    """Settings in which what an earlier run decided for itself stays, where nothing else is asked
    for, and a hub model is named by its commit."""
    if earlier is None:
        return pruning_resolved(prints.pin_revision(config))
    if config.output.rows_per_file is None:
        config = config.replace(rows_per_file=earlier.config.output.rows_per_file)
    return pruning_resolved(prints.pin_revision(config, earlier.config))


def check_finished(
    config: Settings, output: Location, beside: tuple[Sequence[str], Location] | None = None
) -> None:
    """Nothing is left to do there, if it is what these settings would do.

    beside: paths of the inputs and the outer directory, for a run with which another one that is
    not done yet is to be compared: then the input must be the same still.

    Raises:
        UserError: the settings are others, or the model or such an input is.
    """
    earlier = output_directory.earlier(output)
    if earlier is not None:
        found = None if beside is None else expand(*beside)
        output_directory.check_same(
            earlier, prints.take(_settled(config, earlier)), found, output.uri
        )


def resolve_resources(config: Settings, manifest: Manifest, resources: Resources) -> Settings:
    """The settings with what the cluster decided filled in."""
    rows = config.output.rows_per_file
    if rows is None:
        rows = unit_rows(manifest, actors=resources.actors, limit=config.input.limit)
    return config.replace(
        actors=resources.actors, gpus_per_actor=resources.gpus_per_actor, rows_per_file=rows
    )


def execute(
    run: Plan,
    resources: Resources,
    *,
    factory: EngineFactory = build_engine,
    label: str = "",
    stop: Stop | None = None,
    held: lease.Held | None = None,
) -> dict[str, Any]:
    """Do what is left of a run and close it; returns its summary.

    Args:
        run: the plan.
        resources: what the actors may take.
        factory: makes an actor's engine.
        label: put before each line of progress.
        stop: a request to stop, for a signal handler to set.
        held: the lease on the output; None: taken here.

    Raises:
        JobFailed: it cannot go on, or was asked to stop; what is committed stays.
        UserError: another run holds the output; or what an engine says when it starts that the user
            can mend.
    """
    if held is None:
        with lease.hold(run.output) as held:
            return execute(run, resources, factory=factory, label=label, stop=stop, held=held)
    began = time.time()
    config = resolve_resources(run.config, run.manifest, resources)
    pinned = _pinned(run, config)
    assert config.output.rows_per_file is not None
    wanted = list(units(run.manifest, config.output.rows_per_file, config.input.limit))
    committed.sweep(run.output)
    done = committed.listed(run.output) & set(wanted)
    before = committed.totals(run.output, done, pinned.run_id)
    todo = [unit for unit in wanted if unit not in done]
    memory_plan: dict[str, Any] | None = None
    with Progress(
        run.rows, before, log_interval_s=config.limits.log_interval, label=label
    ) as progress:
        seen: set[str] = set()
        coming = _receipts(
            run, config, resources, pinned.run_id, todo, factory,
            stop=stop or Stop(), watch=held.check, say=progress.say,
        )  # fmt: skip
        # Both end at once on any failure: an exception that is kept would keep the actors.
        with closing(coming):
            for item in coming:
                if isinstance(item, Receipt):
                    if item.node not in seen:
                        _check_shared(run, item)
                        seen.add(item.node)
                    progress.add(item.totals)
                    _check_errors(config, before, progress.done)
                elif memory_plan is None:
                    memory_plan = item
                    progress.answering()
                    progress.say(describe(memory_plan))
    _check_complete(run, wanted, progress.done)
    summary = summarise(
        progress.done,
        run_id=pinned.run_id,
        wall_s=time.time() - began,
        done_before=before,
        work_s=progress.work_s,
        resources=resources.describe(),
        memory_plan=memory_plan,
        score=config.output.score,
    )
    if pinned.ids is not None:
        summary["duplicate_ids"] = pinned.ids.duplicates
    held.check()
    committed.sweep(run.output)
    output_directory.close(run.output, summary)
    return summary


def _pinned(run: Plan, config: Settings) -> output_directory.Pinned:
    """What the run is, written down if it is new.

    Raises:
        UserError: another run has begun or ended there since the plan was made.
    """
    output_directory.check_unchanged(run.output, run.earlier)
    if run.earlier is not None:
        pinned = run.earlier
        for line in pinned.fingerprint.notices(run.fingerprint):
            print(line, flush=True)
    else:
        column = run.columns.id
        pinned = output_directory.Pinned(
            run_id=output_directory.new_run_id(),
            manifest=run.manifest,
            columns=run.columns,
            fingerprint=dataclasses.replace(run.fingerprint, settings=config.results()),
            ids=ids.scan(run.manifest, column, limit=config.input.limit) if column else None,
            config=config,
        )
        output_directory.claim(run.output, pinned, decoding_rules.lines(config, run.decoding))
    if pinned.ids is not None and pinned.ids.warning is not None:
        print(pinned.ids.warning, flush=True)
    return pinned


def _there(output: Location, run_id: str, unit: Unit) -> Totals | None:
    """Totals of a unit whose commit nobody lived to tell; None where it is not committed."""
    if not exists(output.join(ROWS, unit.name)):
        return None
    return committed.totals(output, [unit], run_id)


def _check_shared(run: Plan, receipt: Receipt) -> None:
    """What a node writes must be seen here, else days of work would be missed at the end."""
    for _ in range(SHARED_TRIES):
        if exists(run.output.join(ROWS, receipt.unit.name)):
            return
        time.sleep(SHARED_PAUSE_S)
    raise JobFailed(
        f"rows/{receipt.unit.name} was written on node {receipt.node[:8]} and is not to be seen"
        f" here: --output {run.output.uri} must be the same directory on every node, or on an"
        " object store"
    )


def _check_errors(config: Settings, before: Totals, totals: Totals) -> None:
    """End a run early in which nearly everything fails: it would only fail more."""
    rate = totals.error_rate
    if totals.rows - before.rows < ENOUGH_ROWS or rate <= config.limits.max_error_rate:
        return
    kinds = sorted(totals.error_kinds.items(), key=lambda item: -item[1])
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds)
    raise JobFailed(
        f"{totals.errors} of the first {totals.rows} rows are in error ({counts}), more than"
        f" --max-error-rate {config.limits.max_error_rate:g}: ended early. Mend the cause and give"
        " another --output, or go on here with a higher --max-error-rate"
    )


def _check_complete(run: Plan, wanted: Sequence[Unit], totals: Totals) -> None:
    missing = sorted(set(wanted) - committed.listed(run.output))
    if missing or totals.rows != run.rows:
        names = ", ".join(unit.name for unit in missing[:3])
        raise JobFailed(
            f"{totals.rows} of {run.rows} rows were written ({len(missing)} files missing: {names})"
        )


def _receipts(
    run: Plan,
    config: Settings,
    resources: Resources,
    run_id: str,
    todo: Sequence[Unit],
    factory: EngineFactory,
    *,
    stop: Stop,
    watch: Callable[[], None],
    say: Callable[[str], None],
) -> Generator[Receipt | dict[str, Any]]:
    """Receipts of units as they are committed, in any order."""
    assert config.output.rows_per_file is not None
    wait_s = config.cluster.wait_for_nodes
    engine = engine_settings(config, resources)
    rows = RowSettings(
        prompt=config.input.prompt,
        sampling=engine.sampling,
        policy=config.image_policy(),
        seed=config.seed,
        save_kept=config.output.save_kept,
        shared_directory=run.manifest.shared_directory(),
    )
    sink = Sink(
        output=run.output.uri,
        run_id=run_id,
        id_type=run.columns.id_type,
        save_kept=config.output.save_kept,
    )
    dispatcher = Dispatcher(
        WorkQueue(runs(run.manifest, todo, parallel=RUNS_PER_ACTOR * resources.actors)),
        {shard.number: shard for shard in run.manifest.shards},
        ActorOptions(
            actors=resources.actors,
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            calls=max(2, min(MAX_CALLS, 1 + -(-engine.ahead // config.output.rows_per_file))),
        ),
        (engine, rows, run.columns, sink, factory),
        limits=Limits(
            room_s=max(LEAST_ROOM_S, wait_s) if wait_s else ROOM_S,
            stall_s=config.limits.stall_timeout,
            grace_s=config.limits.grace_period,
        ),
        sharing=_sharing(resources),
        stop=stop,
        watch=watch,
        committed=partial(_there, run.output, run_id),
        say=say,
    )
    return dispatcher.receipts()


def _sharing(resources: Resources) -> Callable[[str], int]:
    """How many engines are on a node, by its id: as planned, or as many as a new node holds."""
    planned = {name for name, _ in cluster.named_nodes()}
    need = Need(cpus=resources.cpus_per_actor, gpus=resources.gpus_per_actor)

    def on(node: str) -> int:
        if node in planned:
            return resources.per_node
        found = dict(cluster.named_nodes()).get(node)
        return max(1, min(need.fits_on(found), resources.actors)) if found else 1

    return on


def engine_settings(config: Settings, resources: Resources) -> EngineSettings:
    """What each actor is told about its engine."""
    gpu = resources.gpus_per_actor > 0
    dtype = {"auto": None if gpu else "float32"}.get(config.model.dtype, config.model.dtype)
    return EngineSettings(
        model=config.model.model,
        pruning=config.pruning,
        text_tower=config.model.text_tower,
        text_tower_revision=config.model.text_tower_revision,
        sampling=config.sampling,
        dtype=dtype,
        batch_tokens=config.cluster.batch_tokens,
        max_running=config.cluster.max_running,
        gpu_share=min(1.0, resources.gpus_per_actor),
        actors_per_node=resources.per_node,
        threads=config.cluster.threads,
        ahead=2 * config.cluster.max_running if config.cluster.max_running else AHEAD[gpu],
        revision=config.model.revision,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        system=config.input.system_prompt,
        adapters=config.model.adapters,
    )
