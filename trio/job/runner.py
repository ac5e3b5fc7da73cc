"""A run from its plan to _SUCCESS: passes over what is open, totals, the end.

INPUT a ``Plan``; OUTPUT a finished output directory and its summary.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError

from trio.engine.kv_budget import describe
from trio.errors import JobFailed, kind_and_line
from trio.job import stages
from trio.job.comparing.audit import Audit
from trio.job.comparing.changed_answers import CHANGED, write_changed
from trio.job.comparing.metrics_file import ERROR, TABLE, audit_of, metrics_files, metrics_of
from trio.job.desk import Gauges
from trio.job.engines.engine_settings import (
    EngineFactory,
    EngineSettings,
    PreprocessorFactory,
    build_engines,
    build_preprocessor,
)
from trio.job.images.policy import RowError
from trio.job.input import ids
from trio.job.input.manifest import Manifest
from trio.job.input.units import Unit, unit_rows, units
from trio.job.live.live_summary import LiveSummary
from trio.job.live.prometheus import RunMetrics
from trio.job.nodes.cluster import Resources
from trio.job.output import compaction, output_directory
from trio.job.output import totals as sums
from trio.job.output.dataset_card import CARD, dataset_card
from trio.job.output.gallery import gallery_rows, sample_of
from trio.job.output.output_rows import RowSettings, Source, output_row
from trio.job.output.progress import Progress
from trio.job.output.schema import AUDIT, KEEP, KEPT, LIKELIHOOD, QUESTION, SCORE, row_key
from trio.job.output.scoring import SCORED
from trio.job.output.sink import ROWS, Answered, Sink
from trio.job.output.summary import DONE, of_setting, summarise
from trio.job.output.totals import Totals
from trio.job.passes import LEAST_ROOM_S, ROOM_S, STILL_S, Limits, Passes, Room, Stop
from trio.job.plan import Plan
from trio.job.quarantine import ROW_LOSSES, Attempts
from trio.job.questions import question_settings
from trio.job.resume import committed, decoding_rules, lease
from trio.job.resume.checkpoint_defaults import dtype_resolved
from trio.job.settings import Settings
from trio.job.stages import Described, Receipt, Task
from trio.job.storage import exists

AHEAD = {False: 96, True: 512}
# rows prepared or in the engine at a time, on a CPU and on a GPU, when --max-running is not given
MAX_CALLS = 16
# units that one engine answers at a time
PAUSES_S = (1.0, 5.0, 20.0, 60.0)
# before the next try of what failed once, twice, ...
SHARED_TRIES, SHARED_PAUSE_S = 5, 2.0
# until a shared file system shows what another node has written
MEGABYTE = 10**6
DESCRIBE_S = 60.0
# for id and prompt of a row that is given up
ENOUGH_ROWS = 500
# of this attempt, before a run may be ended for its errors


def resolve_resources(config: Settings, manifest: Manifest, resources: Resources) -> Settings:
    """The settings with what the cluster decided filled in."""
    rows = config.output.rows_per_file
    if rows is None:
        rows = unit_rows(manifest, actors=resources.actors, limit=config.input.limit)
    return config.replace(
        actors=resources.actors, gpus_per_actor=resources.gpus_per_actor, rows_per_file=rows
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Makers:
    """What workers make: an engine, and ahead of it the model's preprocessor."""

    engine: EngineFactory = build_engines
    preprocessor: PreprocessorFactory | None = build_preprocessor
    """None: the engine takes decoded images as they are."""


def execute(
    run: Plan,
    resources: Resources,
    *,
    makers: Makers | None = None,
    label: str = "",
    stop: Stop | None = None,
    held: lease.Held | None = None,
) -> dict[str, Any]:
    """Do what is left of a run and close it; returns its summary.

    Args:
        run: the plan.
        resources: what the stages may take.
        makers: of engine and preprocessor, if not the model's.
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
            return execute(run, resources, makers=makers, label=label, stop=stop, held=held)
    with LiveSummary(run.output, held) as live:
        return _attended(run, resources, makers or Makers(), label, stop or Stop(), held, live)


def _attended(
    run: Plan,
    resources: Resources,
    makers: Makers,
    label: str,
    stop: Stop,
    held: lease.Held,
    live: LiveSummary,
) -> dict[str, Any]:
    """`execute`, while `live` tells others how far it is."""
    began = time.time()
    config = resolve_resources(run.config, run.manifest, resources)
    config, dtype = dtype_resolved(config, gpu=resources.gpus_per_actor > 0)
    pinned = _pinned(run, config, dtype)
    run = dataclasses.replace(run, manifest=pinned.manifest)
    assert config.output.rows_per_file is not None
    rows = config.input
    wanted = list(units(run.manifest, config.output.rows_per_file, rows.limit, rows.only_row))
    committed.sweep(run.output)
    there = committed.listed(run.output).intersection(wanted)
    committed.sweep_gallery(run.output, there)
    parts = committed.by_setting(run.output, there, pinned.run_id, len(config.compared))
    before, score = sums.merge(parts), config.scored_by
    facts: dict[str, Any] = {}
    with (
        Progress(
            run.rows, before, log_interval_s=config.limits.log_interval, label=label
        ) as progress,
        RunMetrics(pinned.run_id) as metrics,
    ):

        def ready(said: Mapping[str, Any]) -> None:
            if not facts:
                facts.update(said)
                progress.answering()
                progress.say(describe(said["memory_plan"]))

        def alive(gauges: Gauges) -> None:
            progress.alive(gauges.answered, len(gauges.engines))
            metrics.look(progress, gauges)
            live.look()

        task = stages_task(run, config, resources, pinned.run_id, makers)
        room = room_of(config, resources, task)

        def figures(state: str) -> dict[str, Any]:
            engines = room.engines_for(len(wanted))
            settings = [
                of_setting(part, one.name, engines=engines, score=score)
                for part, one in zip(parts, config.compared, strict=True)
            ]
            return summarise(
                progress.done,
                name=config.pruning.name,
                run_id=pinned.run_id,
                wall_s=time.time() - began,
                done_before=before,
                work_s=max(0.0, progress.work_s - progress.audit_s / engines),
                resources=resources.describe(),
                memory_plan=facts.get("memory_plan"),
                score=score,
                settings=settings if config.output.compare is not None else (),
                state=state,
            )

        live.begin(figures, progress.say)
        passes = Passes(
            task,
            run.manifest,
            room,
            limits=_limits(config),
            # Engines of an attempt that was just ended may still have their names.
            name=f"captions {pinned.run_id[:8]}-{uuid.uuid4().hex[:4]}",
            stop=stop,
            watch=held.check,
            say=progress.say,
            ready=ready,
            alive=alive,
        )
        seen: set[str] = set()
        # Ends at once on any failure: an exception that is kept would keep the actors.
        with closing(_receipts(run, passes, task, wanted, there)) as coming:
            for receipt in coming:
                if receipt.node not in seen:
                    _check_shared(run, receipt)
                    seen.add(receipt.node)
                progress.add(receipt.totals, receipt.ready_s)
                parts = sums.added(parts, receipt.parts)
                metrics.add(receipt.totals, receipt.engine)
                _check_errors(config, before, progress.done)
        metrics.look(progress)
    _check_complete(run, wanted, progress.done)
    _put_together(run, pinned.run_id, wanted, held, passes, progress.say)
    summary = figures(DONE)
    if config.output.audit:
        summary["audit"] = audit_of(run, progress.done.audit_s)
    if pinned.ids is not None:
        summary["duplicate_ids"] = pinned.ids.duplicates
    held.check()
    committed.sweep(run.output)
    scores = metrics_of(run, pinned.run_id, summary.get("settings") or [summary])
    if scores is not None and ERROR in scores:
        summary["metrics_error"] = scores[ERROR]
    also = {} if scores is None else metrics_files(scores)
    also[CARD] = _card(run, pinned.run_id, config, summary, also.get(TABLE))
    live.rest()
    output_directory.close(run.output, summary, facts.get("images"), also)
    live.end()
    return summary


def _card(
    run: Plan, run_id: str, config: Settings, summary: Mapping[str, Any], figures: str | None
) -> str:
    """The dataset card, written after the file of changed answers that it may name."""
    changed = None
    if len(config.compared) > 1 and summary["rows"]:
        names = [one.name for one in config.compared]
        changed = CHANGED, write_changed(run.output, run_id, names)
    return dataset_card(config, summary, figures=figures, changed=changed)


def _receipts(
    run: Plan, passes: Passes, task: Task, wanted: Sequence[Unit], there: AbstractSet[Unit]
) -> Generator[Receipt]:
    """Receipts of units as they are committed, in any order, each unit once."""
    todo = [unit for unit in wanted if unit not in there]
    attempts = Attempts(todo, many=passes.in_hand)
    while plan := attempts.next():
        coming = passes.run(plan)
        disturbed = yield from _of_pass(coming, attempts, task)
        yield from _without_receipt(run, attempts, task)
        if attempts.open:
            passes.check_stop()
        for row in attempts.ended(disturbed=disturbed):
            attempts.answered(row, _given_up(row, passes, task))
        for unit, rows in attempts.whole():
            parts = _commit_rows(unit, rows, task, passes.say)
            attempts.committed(unit)
            yield Receipt(unit, True, "", parts)


def _of_pass(
    coming: Generator[Receipt, None, bool], attempts: Attempts, task: Task
) -> Generator[Receipt, None, bool]:
    """A pass's receipts of units that are committed; those of single rows are kept."""
    with closing(coming):
        while True:
            try:
                receipt = next(coming)
            except StopIteration as end:
                return bool(end.value)
            if receipt.answered is not None:
                attempts.answered(receipt.unit, receipt.answered)
            elif receipt.done and receipt.unit in attempts.open:
                attempts.committed(receipt.unit)
                yield receipt


def _without_receipt(run: Plan, attempts: Attempts, task: Task) -> Iterator[Receipt]:
    """Units whose commit nobody lived to tell."""
    found = committed.listed(run.output).intersection(attempts.open) if attempts.open else set()
    for unit in sorted(found):
        parts = committed.by_setting(run.output, {unit}, task.sink.run_id, task.sink.settings)
        attempts.committed(unit)
        yield Receipt(unit, True, "", parts)


def _given_up(row: Unit, passes: Passes, task: Task) -> Answered:
    """The output rows of one that killed its process each time it was alone."""
    error = RowError("quarantined", f"the process died {ROW_LOSSES} times while on this row alone")
    said = Described(carried=task.columns.carried(pa.table({"": pa.nulls(1)})))
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(stages.describe)
    coming = remote.remote(passes.a_run([row]), task.columns, task.rows)
    try:
        said = ray.get(coming, timeout=DESCRIBE_S)
    except GetTimeoutError:
        ray.cancel(coming, force=True)
    except RayError:  # it may be the reader that it kills
        pass
    source = Source(key=row_key(row.shard, row.start), table=pa.table({}), index=0, path="")
    source.id, source.asks = said.id, said.asks
    made = [
        output_row(
            source, error, task.rows, actor=stages.DRIVER, node="", prompt_number=n, setting=s
        )
        for n, _ in enumerate(source.asks)
        for s, _ in enumerate(task.engine.prunings)
    ]
    parts = [Totals() for _ in task.engine.prunings]
    for one in made:
        parts[one["setting"]] += sums.of_row(one, source.asks[one["prompt_number"]].answers)
    shown = gallery_rows(task.rows.gallery, [(source, made, [error] * len(made))])
    return Answered(tuple(made), tuple(parts), said.carried, shown)


def _commit_rows(
    unit: Unit, rows: Sequence[Answered], task: Task, tell: Callable[[str], None]
) -> tuple[Totals, ...]:
    """Commit a unit whose rows were answered one by one."""
    parts = sums.added(*(row.parts for row in rows))
    made = [one for row in rows for one in row.rows]
    carried = [row.carried for row in rows if row.carried is not None]
    times = [one["finished_at"] for one in made]
    stats = {"actor": stages.DRIVER, "node": "", "start": min(times), "end": max(times)}
    own = pa.concat_tables(carried) if carried else None
    shown = [line for row in rows for line in row.gallery]
    task.sink.commit(unit, made, [stats] * len(parts), parts, tell, own, shown)
    return parts


def _pinned(run: Plan, config: Settings, dtype: str | None) -> output_directory.Pinned:
    """What the run is, written down if it is new; `dtype`: how it was decided.

    Raises:
        UserError: another run has begun or ended there since the plan was made.
    """
    output_directory.check_unchanged(run.output, run.earlier)
    if run.earlier is not None:
        pinned = run.earlier
        for line in pinned.fingerprint.notices(run.fingerprint):
            print(line, flush=True)
    else:
        column = run.columns.roles.get("id") if config.input.only_row is None else None
        pinned = output_directory.Pinned(
            run_id=uuid.uuid4().hex,
            manifest=run.manifest,
            columns=run.columns,
            fingerprint=dataclasses.replace(run.fingerprint, settings=config.results()),
            ids=ids.scan(run.manifest, column, limit=config.input.limit) if column else None,
            config=config,
        )
        facts = [*decoding_rules.lines(config, run.decoding), *([dtype] if dtype else [])]
        pinned = output_directory.claim(run.output, pinned, facts)
    if pinned.ids is not None and pinned.ids.warning is not None:
        print(pinned.ids.warning, flush=True)
    return pinned


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
    if missing or totals.inputs != run.rows:
        names = ", ".join(unit.name for unit in missing[:3])
        raise JobFailed(
            f"{totals.inputs} of {run.rows} rows were written"
            f" ({len(missing)} files missing: {names})"
        )


def _put_together(
    run: Plan,
    run_id: str,
    wanted: Sequence[Unit],
    held: lease.Held,
    passes: Passes,
    say: Callable[[str], None],
) -> None:
    """Larger files of those of the units."""

    def check() -> None:
        held.check()
        passes.check_stop()

    file_bytes = run.config.output.file_mb * MEGABYTE
    try:
        compaction.compact(run.output, run_id, wanted, file_bytes, check=check, say=say)
    except OSError as error:
        raise JobFailed(
            "all rows are written, but their files could not be put together"
            f" ({kind_and_line(error)}); the same command goes on, with --file-mb 0 without that"
        ) from error


def stages_task(
    run: Plan, config: Settings, resources: Resources, run_id: str, makers: Makers
) -> Task:
    """What the stages of a run are told."""
    engine, also = engine_settings(config, resources), optional_columns(config)
    rows_of, count = config.input, config.output.gallery
    sample = sample_of(run.manifest, rows_of.limit, count, config.seed, rows_of.only_row)
    rows = RowSettings(
        prompts=config.input.prompt,
        template=run.template,
        sampling=engine.sampling,
        policy=config.image_policy(),
        seed=config.seed,
        also=also,
        shared_directory=run.manifest.shared_directory(),
        asking=run.asking,
        audit=Audit(rate=config.output.audit, seed=config.seed) if config.output.audit else None,
        gallery=sample,
    )
    sink = Sink(
        output=run.output.uri,
        run_id=run_id,
        id_type=run.columns.id_type,
        also=also,
        kept=run.columns.kept,
        settings=len(engine.prunings),
        pauses_s=PAUSES_S,
        sample=sample,
    )
    return Task(
        engine=engine,
        rows=rows,
        columns=run.columns,
        pictures=run.pictures,
        sink=sink,
        factory=makers.engine,
        preprocessor=makers.preprocessor,
        stall_s=config.limits.stall_timeout,
        pauses_s=PAUSES_S,
    )


def optional_columns(config: Settings) -> tuple[str, ...]:
    """Groups of columns of this run's rows beside those of all runs."""
    mode, questions = config.questions.mode, config.questions
    asked = {
        KEPT: config.output.save_kept,
        SCORE: config.output.score in SCORED or mode is not None,
        QUESTION: mode is not None,
        LIKELIHOOD: mode == question_settings.LIKELIHOOD,
        KEEP: questions.keep_if is not None,
        AUDIT: bool(config.output.audit),
    }
    return tuple(group for group, wanted in asked.items() if wanted)


def room_of(config: Settings, resources: Resources, task: Task) -> Room:
    assert config.output.rows_per_file is not None
    return Room(
        engines=resources.actors,
        calls=max(2, min(MAX_CALLS, 1 + -(-task.engine.ahead // config.output.rows_per_file))),
        engine=resources.need,
        prepare_tasks=resources.prepare_tasks,
        prepare_cpus=resources.prepare_cpus,
    )


def _limits(config: Settings) -> Limits:
    wait_s, limits = config.cluster.wait_for_nodes, config.limits
    return Limits(
        room_s=max(LEAST_ROOM_S, wait_s) if wait_s else ROOM_S,
        still_s=STILL_S + limits.stall_timeout + limits.row_timeout,
        grace_s=limits.grace_period,
    )


def engine_settings(config: Settings, resources: Resources) -> EngineSettings:
    """What each actor is told about its engine."""
    gpu = resources.gpus_per_actor > 0
    return EngineSettings(
        model=config.model.model,
        prunings=tuple(one.pruning for one in config.compared),
        audit=config.audited_with,
        text_tower=config.model.text_tower,
        text_tower_revision=config.model.text_tower_revision,
        sampling=config.sampling,
        dtype=None if config.model.dtype == "auto" else config.model.dtype,
        batch_tokens=config.cluster.batch_tokens,
        max_running=config.cluster.max_running,
        gpu_share=min(1.0, resources.gpus_per_actor),
        engines_per_node=resources.per_node,
        ahead=2 * config.cluster.max_running if config.cluster.max_running else AHEAD[gpu],
        revision=config.model.revision,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        system=config.input.system_prompt,
        adapters=config.model.adapters,
    )
