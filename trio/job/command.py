"""What every inference job does around a run: arguments, messages, exit codes, the demo's defaults.

Exit codes: 0 all rows written; 1 the job failed; 2 arguments, configuration or input are wrong;
3 finished, but with more rows in error than --max-error-rate allows.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trio import bundled
from trio.errors import JobFailed, UserError
from trio.job import cli, run_yaml
from trio.job.cli import ERRORS, FAILED, OK, WRONG
from trio.job.comparing import audit, metrics_file
from trio.job.comparing.benchmark_table import benchmark_table
from trio.job.comparing.compared import GIVEN
from trio.job.output import ending, output_directory
from trio.job.output.summary import share, table
from trio.job.plan import Plan
from trio.job.plan import plan as plan_of
from trio.job.questions.prompt_notices import prompt_notices
from trio.job.questions.question_settings import GENERATE
from trio.job.resume import decoding_rules
from trio.job.resume.checkpoint_defaults import pruning_resolved
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import DEMO, Settings
from trio.job.storage import Location, is_local, locate
from trio.tables import counted

DEFAULT_RETENTION = 1 / 9
AVERAGE = "average"
"""First word of a call of vqa.py that puts finished comparisons side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One of the jobs."""

    name: str
    # "caption"; names the output and the messages
    description: str
    asks: bool = False
    # questions of data sets, rather than one prompt a row

    @property
    def hidden(self) -> tuple[str, ...]:
        """Settings that are none of its own."""
        return ("prompt", "score") if self.asks else ("questions",)

    @property
    def prog(self) -> str:
        return f"{self.name}.py"


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Run a job from its arguments; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if job.asks and arguments[:1] == [AVERAGE]:
            print(benchmark_table(_outputs(arguments[1:])))
            return OK
        config, dry = cli.read_call(
            arguments, prog=job.prog, description=job.description, hidden=job.hidden
        )
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
    except Exception as error:
        if not isinstance(error, OSError):
            traceback.print_exc()
        return cli.fail(job.prog, f"failed: {type(error).__name__}: {error}"[:500], FAILED)


def _outputs(words: Sequence[str]) -> Sequence[str]:
    """Of `vqa.py average`."""
    if not words or any(word.startswith("-") for word in words):
        raise UserError(f"{AVERAGE}: give output directories of finished comparisons, nothing else")
    return words


def resolve(job: Job, config: Settings) -> Settings:
    """Settings with every default that needs no cluster filled in."""
    changes: dict[str, Any] = _asked(job, config)
    pruning, model = config.pruning, config.model
    items = config.output.compare
    on_demo = _on_demo(config)
    audited = bool(config.output.audit)
    if items is None and on_demo and config.pruning_asked and not (job.asks or audited):
        items = changes["compare"] = ("1", GIVEN)
    is_open = pruning.retention is None and pruning.schedule is None
    if is_open and config.pruning_asked and (items is None or GIVEN in items):
        changes["retention"] = DEFAULT_RETENTION
    comparing = config.text_tower_method
    if model.model == DEMO and comparing and model.text_tower is None:
        changes["text_tower"] = DEMO
    if config.output.score is None:
        as_bundled = on_demo and config.input.columns is None and not job.asks
        changes["score"] = "objects" if as_bundled else "none"
    if config.output.output is None:
        changes["output"] = output_directory.fresh_directory(job.name)
    check_model(model.model)
    if model.text_tower is not None:
        check_model(model.text_tower, "--text-tower")
    elif comparing and model.model != DEMO and (items or config.pruning_asked):
        raise UserError(
            f"--method {comparing} compares images with prompts by CLIP: give as --text-tower"
            " the CLIP that the model's vision encoder comes from,"
            f" {HUB_IDS['--text-tower']} for LLaVA-1.5"
        )
    config = config.replace(**changes)
    if config.output.audit and not config.pruning_asked:
        raise UserError("--audit: nothing is pruned here, so there is nothing to audit")
    # Of a hub id it is known when its commit is.
    here = model_directory(model.model) is not None
    return pruning_resolved(config) if here else config


def _asked(job: Job, config: Settings) -> dict[str, Any]:
    """What is asked where nothing else is said."""
    questions = config.questions
    if not job.asks:
        if questions.mode is not None:
            raise UserError("these are settings of vqa.py: 'mode' is none of this job's")
        return {}
    changes = {"mode": questions.mode or GENERATE}
    if _on_demo(config) and questions.metric is None:
        changes["metric"] = "exact_match"
    for name, other in (("prompt", "--prompt-template"), ("score", "--metric")):
        if config.get(name) not in (None, "none", ()):
            raise UserError(f"{name!r} is a setting of caption.py; here it is {other}")
    return changes


def _on_demo(config: Settings) -> bool:
    """Whether the bundled rows are read: a preset without --input means its own repository."""
    return config.input.input == (DEMO,) and config.questions.preset is None


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


def run(job: Job, config: Settings) -> int:
    """Do the run; print the table."""
    from trio.job import runner
    from trio.job.nodes import cluster
    from trio.job.output import hub_upload
    from trio.job.passes import Stop
    from trio.job.resume import lease

    plan = _plan(config)
    if config.output.push_to_hub is not None:
        hub_upload.check_access(config.output.push_to_hub)
    if plan.finished:
        print(
            f"{plan.output.uri} is finished already: nothing to do. For a new run give another"
            " --output."
        )
        return _ended(job, config, plan.output, output_directory.read_summary(plan.output))
    stop = Stop()
    with lease.hold(plan.output) as held:
        attached = cluster.start(config.cluster.address)
        try:
            resources = cluster.fit(config, attached=attached)
            _announce(config, plan, resources.describe())
            with _stopping_on_signals(stop):
                summary = runner.execute(plan, resources, stop=stop, held=held)
        finally:
            cluster.stop(attached)
    print(f"\n{table(summary)}\n")
    if summary.get("audit") is not None:
        print(f"{audit.described(summary['audit'])}\n")
    if (text := output_directory.read_text(plan.output, metrics_file.TABLE)) is not None:
        print(text)
    _show(config, plan.output)
    return _ended(job, config, plan.output, summary)


def _ended(job: Job, config: Settings, output: Location, summary: Mapping[str, Any]) -> int:
    """The exit code, after the upload of what is good."""
    from trio.job.output import hub_upload

    code, repository = _verdict(job, config, summary), config.output.push_to_hub
    if repository is not None and code == OK:
        print(f"uploading to {repository}", flush=True)
        url = hub_upload.push(output, repository, private=config.output.private)
        print(f"data set: {url}", flush=True)
    elif repository is not None:
        print(f"not uploaded to {repository}", file=sys.stderr, flush=True)
    return code


def _show(config: Settings, output: Location) -> None:
    """Where the rows are, how to open them, and some of the demo's."""
    if _on_demo(config) and not config.input.columns:
        print(f"{ending.examples(output, [one.name for one in config.compared])}\n")
    print(f"rows: {output.join('rows').uri}")
    command = ending.opening(output, several=config.output.compare is not None)
    if command is not None:
        print(f"to see some: {command}")
    print(f"to see it all as a page: {ending.page_command(output)}", flush=True)


def _plan(config: Settings) -> Plan:
    """An input that has changed since is refused unless all is finished."""
    paths = [str(bundled.SHARD) if path == DEMO else path for path in config.input.input]
    if config.questions.preset is not None and config.input.input == (DEMO,):
        paths = []  # its own repository
    done = output_directory.finished(locate(config.output.output or ""))
    return plan_of(config, paths, compare=not done)


@contextmanager
def _stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop while the block runs, and end it at once the second time.

    To be entered after Ray has put its own handlers there, which end the process.
    """

    def first(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        stop()

    before = {number: signal.signal(number, first) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(config: Settings, plan: Plan, resources: str) -> None:
    manifest = plan.manifest
    keep = "nothing pruned"
    if config.pruning_asked and config.output.compare is None:
        schedule, retention = config.pruning.schedule, config.pruning.retention
        keep = f"schedule {schedule}" if schedule else f"retention {retention:.4g}"
    shards, rows = counted(len(manifest.shards), "shard"), counted(plan.rows, "row")
    decoding = decoding_rules.lines(config, plan.decoding)
    asked = f"{config.pruning.name}, {keep}"
    if config.output.compare is not None:
        asked = f"compared: {', '.join(one.name for one in config.compared)}"
    lines = [
        f"input   {shards}, {rows}, {manifest.size / 1e6:.1f} MB",
        f"model   {config.model.model}, {asked}",
        *(line for line in decoding if line != decoding_rules.PLAIN),
        f"runs on {resources}",
        f"output  {locate(config.output.output or '').uri}",
    ]
    if "cluster" in resources and is_local(plan.output.uri):
        lines.append("        a local path: every node must see the same directory there")
    if DEMO in (config.model.model, *config.input.input) and (line := bundled.shadowed()):
        lines.append(line)
    if plan.earlier is None:  # a run that goes on reads nothing of shards that are done
        lines += prompt_notices(config, manifest, plan.columns, plan.asking)
    print("\n".join(lines), flush=True)


def _verdict(job: Job, config: Settings, summary: Mapping[str, Any]) -> int:
    rate = summary["error_rate"]
    if rate > config.limits.max_error_rate:
        message = (
            f"finished, but {share(rate)} of the rows are in error, more than --max-error-rate"
            f" {config.limits.max_error_rate:g}; their column 'error' says why"
        )
        return cli.fail(job.prog, message, ERRORS)
    if summary.get("metrics_error") is not None:
        message = f"all rows are written, but not scored: {summary['metrics_error']}"
        return cli.fail(job.prog, message, WRONG)
    least, found = config.limits.min_agreement, summary.get("audit")
    if least is not None and found is not None:
        agreement = found["agreement"]
        if agreement is None:
            return cli.fail(job.prog, "finished, but no row was audited", ERRORS)
        if agreement["value"] < least:
            message = (
                f"finished, but only {share(agreement['value'])} of the audited answers are those"
                f" of the unpruned model, less than --min-agreement {least:g}"
            )
            return cli.fail(job.prog, message, ERRORS)
    return OK


def dry_run(job: Job, config: Settings) -> int:
    """Print what would be done: the settings as run.yaml, the input and what is left of it."""
    sys.stdout.write(run_yaml.dump(config))
    plan = _plan(config)
    if (repository := config.output.push_to_hub) is not None:
        kind = "private data set" if config.output.private else "data set"
        print(f"# at the end rows/, stats/, figures and run.yaml go to the {kind} {repository} of")
        print("# the hub, which needs HF_TOKEN")
    if plan.finished:
        print("# finished already")
        return OK
    for line in decoding_rules.lines(config, plan.decoding):
        print(f"# {line}")
    roles = ", ".join(f"{role} from {column}" for role, column in plan.columns.roles.items())
    state = "goes on with an unfinished run" if plan.earlier else "new"
    shards = counted(len(plan.manifest.shards), "shard")
    print(f"# {counted(plan.rows, 'row')} of {shards}; {roles}")
    if config.output.compare is not None:
        print(f"# each with {', '.join(one.name for one in config.compared)}")
    print(f"# output {plan.output.uri}, {state}")
    return OK
