"""What every inference job does around a run: arguments, messages, exit codes, the demo's defaults.

Exit codes: 0 all rows written; 1 the job failed; 2 arguments, configuration or input are wrong;
3 finished, but with more rows in error than --max-error-rate allows.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trio import bundled
from trio.errors import JobFailed, UserError
from trio.job import cli, run_yaml
from trio.job.cli import ERRORS, FAILED, OK, WRONG
from trio.job.input.manifest import tell
from trio.job.output import ending, output_directory
from trio.job.output.output_directory import UNPRUNED
from trio.job.output.summary import share, table
from trio.job.plan import Plan, check_finished
from trio.job.plan import plan as plan_of
from trio.job.resume import decoding_rules
from trio.job.resume.checkpoint_defaults import pruning_resolved
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import DEMO, Settings
from trio.job.storage import Location, is_local, locate
from trio.pruning.method_registry import asks_for_text_tower
from trio.tables import counted

DEFAULT_RETENTION = 1 / 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One of the jobs."""

    name: str
    # "caption"; names the output and the messages
    description: str
    package: str
    # directory of the package that holds the demo

    @property
    def prog(self) -> str:
        return f"{self.name}.py"


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Run a job from its arguments; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config, dry = cli.read_call(arguments, prog=job.prog, description=job.description)
        config = resolve(job, config)
        return dry_run(job, config) if dry else run(job, config)
    except UserError as error:
        return cli.fail(job.prog, str(error), WRONG)
    except JobFailed as error:
        return cli.fail(job.prog, str(error), FAILED)
    except KeyboardInterrupt:
        return cli.fail(
            job.prog, "stopped; the same command with the same --output goes on", FAILED
        )
    except OSError as error:
        return cli.fail(job.prog, f"failed: {type(error).__name__}: {error}"[:500], FAILED)
    except Exception as error:
        traceback.print_exc()
        return cli.fail(job.prog, f"failed: {type(error).__name__}: {error}"[:500], FAILED)


def resolve(job: Job, config: Settings) -> Settings:
    """Settings with every default that needs no cluster filled in."""
    changes: dict[str, Any] = {}
    pruning, model = config.pruning, config.model
    if pruning.retention is None and pruning.schedule is None and config.pruning_asked:
        changes["retention"] = DEFAULT_RETENTION
    comparing = asks_for_text_tower(pruning)
    if model.model == DEMO and comparing and model.text_tower is None:
        changes["text_tower"] = DEMO
    if config.output.compare_unpruned is None:
        changes["compare_unpruned"] = config.input.input == (DEMO,) and config.pruning_asked
    if config.output.score is None:
        as_bundled = config.input.input == (DEMO,) and config.input.columns is None
        changes["score"] = "objects" if as_bundled else "none"
    if config.output.output is None:
        changes["output"] = output_directory.fresh_directory(job.name)
    check_model(model.model)
    if model.text_tower is not None:
        check_model(model.text_tower, "--text-tower")
    elif comparing and model.model != DEMO and config.pruning_asked:
        raise UserError(
            f"--method {pruning.method} compares images with prompts by CLIP: give as --text-tower"
            " the CLIP that the model's vision encoder comes from,"
            f" {HUB_IDS['--text-tower']} for LLaVA-1.5"
        )
    config = config.replace(**changes)
    # Of a hub id it is known when its commit is.
    here = model_directory(model.model) is not None
    return pruning_resolved(config) if here else config


HUB_IDS = {
    "--model": "llava-hf/llava-1.5-7b-hf",
    "--text-tower": "openai/clip-vit-large-patch14-336",
}
"""Examples for messages, by flag."""


def check_model(model: str, flag: str = "--model") -> None:
    """A directory that is none would else be taken for a hub id, and fail late and elsewhere."""
    if model == DEMO:
        return
    looks_local = model.startswith(("/", "./", "../")) or model.count("/") > 1
    local = looks_local or os.path.isdir(model)
    if local and not os.path.isfile(os.path.join(model, "config.json")):
        raise UserError(
            f"{flag} {model}: no model there (no config.json); give a directory that"
            f" save_pretrained wrote, or a hub id such as {HUB_IDS[flag]}"
        )


def input_paths(job: Job, config: Settings) -> list[str]:
    """Where the inputs lie; ``demo`` is inside the package."""
    return [
        os.path.join(job.package, "demo", "data") if p == DEMO else p for p in config.input.input
    ]


def unpruned(config: Settings) -> Settings:
    """The same rows without pruning."""
    assert config.output.output is not None
    return config.replace(
        output=locate(config.output.output).join(UNPRUNED).uri,
        method="none",
        encoder="none",
        text_tower=None,
        text_tower_revision=None,
        retention=1.0,
        schedule=None,
        compare_unpruned=False,
    )


def runs(config: Settings) -> Iterator[tuple[str, Settings]]:
    """(heading, settings) of each run to do; the one that was asked for comes first."""
    yield config.pruning.name, config
    if config.output.compare_unpruned:
        yield UNPRUNED, unpruned(config)


def run(job: Job, config: Settings) -> int:
    """Do the run, and the comparison where asked; print the table."""
    from trio.job import runner
    from trio.job.nodes import cluster
    from trio.job.passes import Stop
    from trio.job.resume import lease

    assert config.output.output is not None
    output = locate(config.output.output)
    plans = _plans(job, config, output)
    to_do = [plan for _, plan in plans if isinstance(plan, Plan)]
    if not to_do:
        print(
            f"{output.uri} is finished already: nothing to do. For a new run give another --output."
        )
        return _verdict(job, config, plans[0][1])
    stop, done = Stop(), []
    with lease.hold(output) as held:
        attached = cluster.start(config.cluster.address)
        try:
            resources = cluster.fit(config, attached=attached)
            _announce(config, to_do[0], resources.describe())
            with _stopping_on_signals(stop):
                for name, plan in plans:
                    if isinstance(plan, Plan):
                        label = name if len(plans) > 1 else ""
                        plan = runner.execute(plan, resources, label=label, stop=stop, held=held)
                    done.append((name, plan))
        finally:
            cluster.stop(attached)
    print(f"\n{table(done)}\n")
    _show(config, output)
    return _verdict(job, config, done[0][1])


def _show(config: Settings, output: Location) -> None:
    """Where the rows are, how to open them, and some of the demo's."""
    if config.input.input == (DEMO,) and not config.input.columns:
        print(f"{ending.examples(output)}\n")
    print(f"rows: {output.join('rows').uri}")
    command = ending.opening(output)
    if command is not None:
        print(f"to see some: {command}", flush=True)


def _plans(job: Job, config: Settings, output: Location) -> list[tuple[str, Any]]:
    """(heading, plan) of each run, or its summary if it is finished; the main one first."""
    wanted = [(name, each, locate(each.output.output or "")) for name, each in runs(config)]
    whole = all(output_directory.finished(place) for _, _, place in wanted)
    out: list[tuple[str, Any]] = []
    for name, each, place in wanted:
        paths = input_paths(job, each)
        if output_directory.finished(place):
            check_finished(each, place, None if whole else (paths, output))
            out.append((name, output_directory.read_summary(place)))
        else:
            say = tell if each is config else _nothing
            plan = plan_of(each, paths, around=output, say=say)
            out.append((name, plan))
    return out


def _nothing(_: str) -> None:
    """What the comparison would say of the input, the main run says."""


@contextmanager
def _stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop while the block runs, and end it at once the second time.

    To be entered after Ray has put its own handlers there, which end the process.
    """

    def first(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, first) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(config: Settings, plan: Any, resources: str) -> None:
    manifest = plan.manifest
    keep = "nothing pruned"
    if config.pruning_asked:
        schedule, retention = config.pruning.schedule, config.pruning.retention
        keep = f"schedule {schedule}" if schedule else f"retention {retention:.4g}"
    shards, rows = counted(len(manifest.shards), "shard"), counted(plan.rows, "row")
    print(f"input   {shards}, {rows}, {manifest.size / 1e6:.1f} MB")
    print(f"model   {config.model.model}, {config.pruning.name}, {keep}")
    for told in decoding_rules.lines(config, plan.decoding):
        if told != decoding_rules.PLAIN:
            print(told)
    print(f"runs on {resources}")
    print(f"output  {locate(config.output.output or '').uri}", flush=True)
    if "cluster" in resources and is_local(plan.output.uri):
        print("        a local path: every node must see the same directory there", flush=True)
    if DEMO in (config.model.model, *config.input.input) and (line := bundled.shadowed()):
        print(line, flush=True)
    for line in ending.prompt_notices(config, manifest, plan.columns.prompt):
        print(line, flush=True)


def _verdict(job: Job, config: Settings, summary: Mapping[str, Any]) -> int:
    rate = summary["error_rate"]
    if rate > config.limits.max_error_rate:
        message = (
            f"finished, but {share(rate)} of the rows are in error, more than --max-error-rate"
            f" {config.limits.max_error_rate:g}; their column 'error' says why"
        )
        return cli.fail(job.prog, message, ERRORS)
    return OK


def dry_run(job: Job, config: Settings) -> int:
    """Print what would be done: the settings as run.yaml, the input and what is left of it."""
    output = locate(config.output.output or "")
    sys.stdout.write(run_yaml.dump(config))
    plans = _plans(job, config, output)
    planned = [plan for _, plan in plans if isinstance(plan, Plan)]
    for line in decoding_rules.lines(config, planned[0].decoding) if planned else ():
        print(f"# {line}")
    for name, plan in plans:
        if not isinstance(plan, Plan):
            print(f"# {name}: finished already")
            continue
        roles = ", ".join(f"{role} from {column}" for role, column in plan.columns.roles.items())
        state = "goes on with an unfinished run" if plan.earlier else "new"
        shards = counted(len(plan.manifest.shards), "shard")
        print(f"# {name}: {counted(plan.rows, 'row')} of {shards}; {roles}")
        print(f"# {name}: output {plan.output.uri}, {state}")
    return OK
