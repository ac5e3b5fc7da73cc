"""What a run is to do, checked before Ray starts: input, output, settings, what is there already.

INPUT ``Settings``; OUTPUT a ``Plan``, or an error of the user's in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from trio.engine.decoding.generation_rules import Rules
from trio.errors import UserError
from trio.job.input import own_columns
from trio.job.input.columns import CARRIED, OWN, Columns, of_template, parse_mapping, resolve
from trio.job.input.joined_pictures import PictureFiles
from trio.job.input.kinds.saved_datasets import WHOLE, Part
from trio.job.input.manifest import Manifest, expand, inspect, tell
from trio.job.output import output_directory
from trio.job.output.schema import OPTIONAL, rows_schema, split_key
from trio.job.output.scoring import SCORED
from trio.job.questions.asking import Asking, asking_of
from trio.job.questions.constraint_check import check_constraint, constrained, schema_digest
from trio.job.questions.dataset_files import PICTURES, digests, picture_files, question_paths
from trio.job.resume import decoding_rules
from trio.job.resume import fingerprint as prints
from trio.job.resume.checkpoint_defaults import pruning_resolved
from trio.job.resume.fingerprint import Fingerprint
from trio.job.resume.hub import pin_revision
from trio.job.settings import Settings
from trio.job.storage import Location, locate
from trio.vqa.presets.prompt_template import PromptTemplate


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
    asking: Asking | None = None
    """Of `jobs/vqa.py`."""
    pictures: PictureFiles | None = None
    """That rows are joined with."""
    template: PromptTemplate | None = None
    """Of the prompt of `jobs/caption.py`."""

    @property
    def rows(self) -> int:
        limit = self.config.input.limit
        if self.config.input.only_row is not None:
            return 1
        return self.manifest.rows if limit is None else min(limit, self.manifest.rows)


def plan(
    config: Settings,
    paths: Sequence[str],
    *,
    compare: bool = True,
    say: Callable[[str], None] = tell,
) -> Plan:
    """Check input and output.

    Args:
        config: the settings.
        paths: where their inputs lie.
        compare: whether the input must still be the one that an earlier run there began with.
        say: told of files that are left out.

    Raises:
        UserError: anything in them that keeps the run from making sense.
    """
    assert config.output.output is not None, "the job chooses an output"
    output = locate(config.output.output)
    earlier = output_directory.earlier(output)
    config = constrained(_settled(config, earlier))
    questions, asking, pictures = config.questions, None, None
    template = _template(config)
    part = Part(config.input.subset, config.input.split)
    if questions.preset is not None:
        asking = asking_of(questions, template, part=part)
        part = WHOLE  # its files are the part
        if compare:
            paths = question_paths(asking.preset, paths, say)
            pictures = picture_files(asking.preset, questions, paths, say)
    also = digests(questions, pictures) | schema_digest(config)
    if earlier is not None and not compare and PICTURES in earlier.fingerprint.model_files:
        also[PICTURES] = earlier.fingerprint.model_files[PICTURES]
    now = prints.take(config, also)
    if earlier is not None:
        found = expand(paths, output, say, part) if compare else None
        output_directory.check_same(earlier, now, found, output.uri)
        manifest, columns = earlier.manifest, earlier.columns
        if questions.mode is not None and asking is None:
            names = [role[1:] for role in columns.roles if role[0] == OWN]
            asking = asking_of(questions, template, names)
    else:
        check_constraint(config)
        manifest, schemas = inspect(paths, output, say, part, config.input.limit)
        paths = [shard.path for shard in manifest.shards]
        found_in = own_columns.partitions(paths)
        whole = own_columns.with_fields(schemas, paths, found_in)
        if questions.mode is not None and asking is None:
            asking = asking_of(questions, template, whole[0].names)
        columns = _columns(config, asking, template, schemas, whole, paths)
        columns = _with_own(columns, config, found_in, whole, paths, say)
    _check_only_row(config, manifest)
    return Plan(
        config=config, manifest=manifest, columns=columns, output=output, fingerprint=now,
        earlier=earlier, finished=output_directory.finished(output),
        decoding=decoding_rules.read(config), asking=asking, pictures=pictures,
        template=None if asking else template,
    )  # fmt: skip


def _columns(
    config: Settings,
    asking: Asking | None,
    template: PromptTemplate | None,
    schemas: Sequence[pa.Schema],
    whole: Sequence[pa.Schema],
    paths: Sequence[str],
) -> Columns:
    """What is read of the shards, whose `whole` schemas have the columns of their paths too."""
    mapping = parse_mapping(config.input.columns or "")
    if asking is not None or template is not None:
        _refuse(mapping, "prompt", "--prompt-template")
    if asking is None:
        also = of_template(template, whole, paths) if template is not None else []
        return resolve(
            schemas, paths, mapping if template is None else mapping | {"prompt": "none"},
            prompt_given=bool(config.input.prompt) or template is not None,
            scored=config.output.score in SCORED,
            also=also,
        )  # fmt: skip
    _refuse(mapping, "answers", "a preset's fields")
    asking.check(whole, paths)
    there = {name for schema in whole for name in schema.names}
    return resolve(
        schemas,
        paths,
        asking.roles() | mapping | {"prompt": "none"},
        prompt_given=True,
        joined=asking.preset.images is not None,
        also=[name for name in asking.columns if name in there],
    )


def _check_only_row(config: Settings, manifest: Manifest) -> None:
    if config.input.only_row is None:
        return
    shard, row = split_key(config.input.only_row)
    if shard >= len(manifest.shards) or row >= manifest.shards[shard].rows:
        raise UserError(
            f"--only-row {config.input.only_row}: the input has no such row; give a number from the"
            " column row of an output, with the --input that it was made of"
        )


def _refuse(mapping: Mapping[str, str], role: str, other: str) -> None:
    if mapping.get(role, "none") not in ("none", ""):
        raise UserError(f"--columns {role}={mapping[role]}: here it is said by {other}")


def _template(config: Settings) -> PromptTemplate | None:
    text = config.input.prompt_template
    return None if text is None else PromptTemplate(text)


def _with_own(
    columns: Columns,
    config: Settings,
    found_in: pa.Schema,
    schemas: Sequence[pa.Schema],
    paths: Sequence[str],
    say: Callable[[str], None],
) -> Columns:
    """With the columns that go along, and those in the names of directories that are read."""
    kept, roles = columns.kept, dict(columns.roles)
    if config.input.keep_columns is not None:
        same = {name for role, name in roles.items() if role in ("id", "prompt") and role == name}
        kept = own_columns.kept_columns(
            config.input.keep_columns,
            schemas,
            paths,
            given=same,
            ours=rows_schema(pa.null(), run_id="", also=tuple(OPTIONAL)).names,
            say=say,
        )
        roles |= {CARRIED + name: name for name in own_columns.sources_of(kept)}
    read = [one for one in found_in if {OWN + one.name, CARRIED + one.name} & roles.keys()]
    return replace(columns, roles=roles, kept=kept, partitions=pa.schema(read))


def _settled(config: Settings, earlier: output_directory.Pinned | None) -> Settings:
    """Settings in which what an earlier run decided for itself stays, where nothing else is asked
    for, and a hub model is named by its commit."""
    if earlier is None:
        return pruning_resolved(pin_revision(config))
    if config.model.dtype == "auto":
        config = config.replace(dtype=earlier.config.model.dtype)
    if config.output.rows_per_file is None:
        config = config.replace(rows_per_file=earlier.config.output.rows_per_file)
    return pruning_resolved(pin_revision(config, earlier.config))
