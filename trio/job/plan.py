"""What a run is to do, checked before Ray starts: input, output, settings, what is there already.

INPUT ``Settings``; OUTPUT a ``Plan``, or an error of the user's in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trio.engine.decoding.generation_rules import Rules
from trio.job.input.columns import Columns, parse_mapping, resolve
from trio.job.input.manifest import Manifest, expand, inspect, tell
from trio.job.output import output_directory
from trio.job.resume import decoding_rules
from trio.job.resume import fingerprint as prints
from trio.job.resume.checkpoint_defaults import pruning_resolved
from trio.job.resume.fingerprint import Fingerprint
from trio.job.resume.hub import pin_revision
from trio.job.settings import SCORED, Settings
from trio.job.storage import Location, locate


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known before Ray starts."""

    config: Settings
    manifest: Manifest
    columns: Columns
    output: Location
    fingerprint: Fingerprint
    earlier: output_directory.Pinned | None
    finished: bool
    """Nothing is left to do."""
    decoding: Rules | None
    """Of the model; None: they cannot be read here."""

    @property
    def rows(self) -> int:
        limit = self.config.input.limit
        return self.manifest.rows if limit is None else min(limit, self.manifest.rows)


def plan(
    config: Settings,
    paths: Sequence[str],
    *,
    around: Location | None = None,
    compare: bool = True,
    say: Callable[[str], None] = tell,
) -> Plan:
    """Check input and output.

    Args:
        config: the settings.
        paths: where their inputs lie.
        around: the directory around this run's, if another run keeps its output there: no input.
        compare: whether the input must still be the one that an earlier run there began with.
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
        found = expand(paths, ours, say) if compare else None
        output_directory.check_same(earlier, now, found, output.uri)
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
        config=config, manifest=manifest, columns=columns, output=output, fingerprint=now,
        earlier=earlier, finished=output_directory.finished(output),
        decoding=decoding_rules.read(config),
    )  # fmt: skip


def _settled(config: Settings, earlier: output_directory.Pinned | None) -> Settings:
    """Settings in which what an earlier run decided for itself stays, where nothing else is asked
    for, and a hub model is named by its commit."""
    if earlier is None:
        return pruning_resolved(pin_revision(config))
    if config.output.rows_per_file is None:
        config = config.replace(rows_per_file=earlier.config.output.rows_per_file)
    return pruning_resolved(pin_revision(config, earlier.config))
