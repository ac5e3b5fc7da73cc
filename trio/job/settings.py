"""Settings of an inference job, in groups: one declaration for flags, help, run.yaml and code.

A flag `--max-new-tokens` is the field `max_new_tokens` of its group here and that key of run.yaml.
`pruning` and `sampling` are the engine's own settings. No torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from trio import bundled
from trio.engine.request import Sampling
from trio.errors import UserError
from trio.job.comparing.compared import GIVEN, Compared, compared, read_compared, settings_compared
from trio.job.images.policy import MAX_PIXELS, ROW_TIMEOUT_S, ImagePolicy, parse_origin, redact
from trio.job.input.columns import parse_mapping
from trio.job.output.gallery import MOST_ROWS
from trio.job.output.scoring import SCORED
from trio.job.questions.question_settings import LIKELIHOOD, Questions
from trio.job.questions.structured_answers import Structured
from trio.job.storage import check_no_secret, is_local, local_path
from trio.pruning.method_registry import asks_for_text_tower
from trio.pruning.options import BuiltIn, BuiltInNumber, Pruning
from trio.pruning.pruning_config import PruningDefaults
from trio.values import (
    Pixels,
    Rows,
    Seed,
    Setting,
    Share,
    Switch,
    Text,
    Tokens,
    Value,
    accepted,
    each,
    many,
    names,
    number,
    one_of,
    plain,
    replaced,
    settings_of,
    text,
    whole,
)
from trio.vqa.presets.prompt_template import PromptTemplate

DEMO = bundled.NAME
"""Stands for the bundled shard and the bundled model, wherever the package is installed."""
AUTO, LOCAL = "auto", "local"
"""Of --address: the Ray of this machine, and one of the job's own."""
MOST_FILE_MB = 4000
DTYPES = ("auto", "float32", "bfloat16", "float16")


_PLACE = accepted(check_no_secret)
"""A path or URI."""


def _directory(value: Any) -> str:
    """A local directory, made absolute: workers have other working ones."""
    if not is_local(text(value)):
        raise UserError(f"expected a local directory, got {redact(value)!r}")
    try:
        return os.path.normpath(local_path(value))
    except OSError as error:
        raise UserError(str(error)) from error


def _template(value: Any) -> str:
    """Of a prompt; a shell hands on a line break as it is written, with a backslash."""
    read = text(value).replace("\\n", "\n")
    return PromptTemplate(read).text


def _file_mb(value: Any) -> int:
    read = whole(0)(value)
    if read > MOST_FILE_MB:
        raise UserError(
            f"must be at most {MOST_FILE_MB}, got {read}: stores copy no larger objects"
        )
    return read


def _gallery(value: Any) -> int:
    read = whole(0)(value)
    if read > MOST_ROWS:
        raise UserError(f"must be at most {MOST_ROWS}, got {read}: --save-kept is for all rows")
    return read


def _repository(value: Any) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text(value)):
        raise UserError(f"expected ORG/NAME, got {value!r}")
    return str(value)


def _adapter(value: Any) -> str:
    if not re.fullmatch(r"[\w.-]+=\w+(\.\w+)*:\w+", text(value)):
        raise UserError(f"expected TYPE=MODULE:CLASS, as in my_vl=my_module:MyAdapter: {value!r}")
    return str(value)


def read_address(value: Any) -> str:
    """Of a Ray: auto, local or host:port."""
    read = text(value)
    host_and_port = r"(\[[\da-fA-F:.]+\]|[\w.-]+):\d{1,5}"
    if read not in (AUTO, LOCAL) and not re.fullmatch(host_and_port, read):
        raise UserError(f"expected auto, local or host:port, got {read!r}")
    return read


Count = Annotated[int, Value(read=whole(1), unit="N")]
Seconds = Annotated[float, Value(read=number(least=0), unit="SECONDS")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """Which rows are read, and which images they may bring."""

    input: Annotated[tuple[str, ...], many(_PLACE, "PATH", least=1)] = (DEMO,)
    """Parquet, images, WebDataset tars, JSONL, CSV, or what save_to_disk of datasets wrote: file,
    directory or quoted pattern, s3://, gs:// or hf://datasets/ORG/NAME URI; several may be given;
    demo is the bundled shard."""
    subset: Annotated[str | None, Value(read=text, unit="NAME")] = None
    """Configuration of a data set, as ScienceQA-FULL (default: the preset's, or the only one)."""
    split: Annotated[str | None, Value(read=text, unit="NAME")] = None
    """Split of a data set, as validation (default: the preset's, or the only one)."""
    prompt: Annotated[tuple[str, ...], each(text, "TEXT")] = ()
    """Prompt for rows that bring none; given several times, each row is asked each of them, and its
    images are prepared and encoded once."""
    prompt_template: Annotated[str | None, Value(read=_template, unit="TEMPLATE")] = None
    """Prompt made of columns, as in '{question}\\nAnswer in one word.' (default: the preset's; the
    column prompt or question)."""
    system_prompt: Text | None = None
    """System message of all rows, if the model's chat template has a place for one (default: the
    template's own)."""
    columns: Annotated[str | None, Value(read=text, unit="ROLE=COLUMN,...")] = None
    """Names of input columns, as in image=jpg,prompt=caption_prompt; the roles are image, prompt,
    id and answers, and max_new_tokens, temperature, seed and system, which stand for the settings
    of single rows; id=none leaves an id column out."""
    keep_columns: Annotated[tuple[str, ...] | None, Value(read=names, unit="COLUMN,...")] = None
    """Columns of the input, partitions (day=1/) included, that the output gets as they are; all
    stands for all but those with images, which have to be named (default: none)."""
    limit: Rows | None = None
    """Stop after the first rows of the input (default: all)."""
    only_row: Annotated[int | None, Value(read=whole(0), unit="ROW")] = None
    """Answer one row of the input alone, by its number in the column row of an output (default:
    all)."""
    allow_remote_images: Switch = False
    """Fetch http and https URIs found in the image column, from hosts with public addresses, and
    what --remote-images-from names."""
    remote_images_from: Annotated[tuple[str, ...], many(accepted(parse_origin), "ORIGIN")] = ()
    """With --allow-remote-images: only from these schemes and hosts, as in
    https://images.example.org, https://*.cdn.net or s3://bucket. A host named in full may have a
    private address; proxies are not used; objects of stores (s3, gs, hf and others) are read with
    the nodes' credentials, and only from buckets named here (default: any public web server)."""
    image_roots: Annotated[tuple[str, ...], many(_directory, "DIR")] = ()
    """Directories that paths in the image column may lead into, links followed, besides the
    directory of the row's shard (default: none)."""
    max_image_pixels: Pixels = MAX_PIXELS
    """Larger images are not decoded: their rows end in error (--max-pixels reduces images)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What answers."""

    model: Annotated[str, Value(read=_PLACE, unit="MODEL")] = DEMO
    """Hub id or directory; demo is the bundled one."""
    revision: Annotated[str | None, Value(read=text, unit="REVISION")] = None
    """Commit, tag or branch of a hub id; run.yaml names the commit, which a resumed run keeps to
    (default: the newest of the main branch)."""
    dtype: Annotated[str, one_of(DTYPES)] = "auto"
    """Of the model's weights; auto: bfloat16 on GPUs; float32 on CPUs, but bfloat16 where the one
    that the job starts on has matrix units (amx_bf16) and the checkpoint is in half precision.
    run.yaml names what was taken, which a resumed run keeps to on any machine."""
    min_pixels: Pixels | None = None
    """Smaller images are enlarged to this width times height before the model sees them; for models
    that take images at many sizes, as Qwen's (default: the processor's)."""
    max_pixels: Pixels | None = None
    """Larger images are reduced to this width times height before the model sees them, which bounds
    their visual tokens; for the same models (default: the processor's)."""
    text_tower: Annotated[str | None, Value(read=_PLACE, unit="MODEL")] = None
    """For methods eadp and cdpruner: the CLIP that the model's vision encoder comes from, hub id or
    directory, as openai/clip-vit-large-patch14-336 for LLaVA-1.5 (default: the demo model's own for
    it)."""
    text_tower_revision: Annotated[str | None, Value(read=text, unit="REVISION")] = None
    """Commit, tag or branch of a hub id given as --text-tower, as --revision."""
    adapters: Annotated[tuple[str, ...], many(_adapter, "TYPE=MODULE:CLASS")] = ()
    """Families of models that this package does not have, as in my_vl=my_module:MyAdapter; the
    module must be importable where engines run (default: none)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What is written, and where."""

    output: Annotated[str | None, Value(read=_PLACE, unit="DIR")] = None
    """Directory or URI for rows/, stats/ and the rest; a run that stopped there goes on, a finished
    one is left alone (default: a new directory below trio-output/)."""
    rows_per_file: Rows | None = None
    """Rows of one work unit and output file: what is redone after a crash (default: by size)."""
    file_mb: Annotated[int, Value(read=_file_mb, unit="MB")] = 64
    """When all rows are there, put the units' files together into larger ones of this size; 0
    leaves them as they are."""
    save_kept: Switch = False
    """Write the kept visual tokens of each stage."""
    gallery: Annotated[int, Value(read=_gallery, unit="ROWS")] = 100
    """Of so many rows, drawn by --seed, gallery/ keeps what a page shows: answers, thumbnails of
    the images and what each stage kept; and of ten times as many those in error and those whose
    answers are not the same in all settings, or not as unpruned; 0 keeps none."""
    score: Annotated[str | None, one_of((*SCORED, "none"))] = None
    """Compare responses with the column answers: exact (right is what equals one of the row's
    answers, both in lower case, without articles and punctuation; this is not VQA's accuracy),
    objects (that, and for answers such as "a red 7 and a blue 3" the share of objects named
    rightly) or none (default: objects for the bundled shard with its own columns, else none)."""
    compare: Annotated[tuple[str, ...] | None, Value(read=read_compared, unit="RETENTION,...")] = (
        None
    )
    """Ask every row with each of these settings, one after the other, and say what each costs: 1 is
    the unpruned model, 1/9 a retention, fastv:1/9 and visionzip+trio:1/9 name what chooses, given
    stands for what the other flags say (default: 1,given for the bundled shard)."""

    push_to_hub: Annotated[str | None, Value(read=_repository, unit="ORG/NAME")] = None
    """When the run has ended well, upload rows, statistics, figures and run.yaml as a data set to
    this repository of the Hugging Face Hub, which is made if need be; needs HF_TOKEN (default: no
    upload)."""
    private: Switch = False
    """With --push-to-hub: a repository that is made is a private one."""
    audit: Share | None = None
    """Ask this share of the rows unpruned as well, and say how many answers stay the same; the
    rows are chosen by --seed (default: none)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where it runs, and how much at once."""

    address: Annotated[str | None, Value(read=read_address, unit="RAY")] = None
    """Ray to run on: local starts one for this job, auto joins the one of this machine, host:port
    joins a cluster (default: RAY_ADDRESS; without it local); for "ray job submit" leave it out."""
    actors: Count | None = None
    """Engines (default: one per GPU; without GPUs 1)."""
    gpus_per_actor: Annotated[float | None, Value(read=number(least=0), unit="GPUS")] = None
    """GPUs of one engine (default: 1 where there are GPUs, else 0)."""
    cpus_per_actor: Annotated[float, Value(read=number(least=0), unit="CPUS")] = 1.0
    """Logical CPUs that Ray sets aside for one engine."""
    wait_for_nodes: Seconds = 0.0
    """Above 0: nodes may join after the start (autoscaling, spot); the job begins with what there
    is, and fails if after this time there is no engine at all."""
    prepare_cpus: Count | None = None
    """CPUs that decode and preprocess images, on any node; Ray prefers nodes without GPUs (default:
    what the engines leave; for engines on a CPU at most two for each)."""
    threads: Count | None = None
    """The same, for each engine."""
    batch_tokens: Tokens | None = None
    """Most prompt tokens in one prefill (default: the engine's)."""
    max_running: Annotated[int | None, Value(read=whole(1), unit="REQUESTS")] = None
    """Most requests decoded together (default: the engine's)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When to give up, and how often to say how far it is."""

    max_error_rate: Share = 0.5
    """Share of rows in error above which the exit code is 3."""
    min_agreement: Share | None = None
    """With --audit: share of answers that stay as unpruned, below which the exit code is 3
    (default: any will do)."""
    row_timeout: Annotated[float, Value(read=number(least=0.1, most=86_400), unit="SECONDS")] = (
        ROW_TIMEOUT_S
    )
    """For fetching and decoding the images of one row."""
    stall_timeout: Annotated[float, Value(read=number(least=1), unit="SECONDS")] = 600.0
    """An engine in which nothing moves for so long is started anew."""
    grace_period: Seconds = 60.0
    """For rows under way when the job is told to stop (SIGTERM)."""
    log_interval: Annotated[float, Value(read=number(least=0.1), unit="SECONDS")] = 10.0
    """Between two progress lines where output is no terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All of a job; None where the job decides for itself."""

    input: Input = field(default_factory=Input)
    model: Model = field(default_factory=Model)
    pruning: Pruning = field(default_factory=Pruning)
    sampling: Sampling = field(default_factory=Sampling)
    seed: Seed = 0
    """Of sampling and of --method random."""
    structured: Structured = field(default_factory=Structured)
    questions: Questions = field(default_factory=Questions)
    output: Output = field(default_factory=Output)
    cluster: Cluster = field(default_factory=Cluster)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        model, rows = self.model, self.input
        if model.min_pixels and model.max_pixels and model.min_pixels > model.max_pixels:
            raise UserError(
                f"--min-pixels {model.min_pixels} is above --max-pixels {model.max_pixels}"
            )
        if rows.remote_images_from and not rows.allow_remote_images:
            raise UserError("--remote-images-from needs --allow-remote-images: give both or none")
        if rows.only_row is not None and self.output.push_to_hub is not None:
            raise UserError("--only-row and --push-to-hub exclude each other: give one of them")
        if self.output.private and self.output.push_to_hub is None:
            raise UserError("--private needs --push-to-hub ORG/NAME")
        self._check_compared()
        self._check_prompts()
        if model.text_tower is not None and self.text_tower_method is None:
            raise UserError(f"--text-tower: method {self.pruning.method} does not use it")
        if self.cluster.threads is not None and self.cluster.prepare_cpus is not None:
            raise UserError("--threads and --prepare-cpus say the same: give one of them")
        if self.structured != Structured() and self.questions.mode == LIKELIHOOD:
            raise UserError(
                "--mode likelihood gives no answers of the model's own: leave out --json-schema,"
                " --regex and --choices (its answers are --candidates)"
            )
        parse_mapping(rows.columns or "")
        seeded = dataclasses.replace(self.pruning, seed=self.seed)
        object.__setattr__(self, "pruning", seeded)

    def _check_prompts(self) -> None:
        rows = self.input
        if rows.prompt and rows.prompt_template is not None:
            raise UserError("--prompt and --prompt-template exclude each other: give one of them")
        if len(set(rows.prompt)) < len(rows.prompt):
            raise UserError("--prompt: the same text is given twice")
        if len(rows.prompt) > 1 and self.output.score in SCORED:
            raise UserError(
                f"--score {self.output.score} compares with one answer: give one --prompt"
            )

    def _check_compared(self) -> None:
        items, pruning = self.output.compare, self.pruning
        if self.limits.min_agreement is not None and not self.output.audit:
            raise UserError("--min-agreement needs --audit RATE")
        if self.output.audit and items is not None:
            raise UserError("--audit and --compare exclude each other: the latter asks all rows")
        if items is None or GIVEN in items:
            return
        for name in ("retention", "schedule"):
            if getattr(pruning, name) is not None:
                raise UserError(
                    f"--{name} and --compare {','.join(items)} exclude each other; to have it"
                    f" compared as well, write {GIVEN} among them"
                )

    @property
    def scored_by(self) -> str | None:
        """How answers are scored: a rule of captions, or a metric of questions."""
        if self.questions.mode is not None:
            return self.questions.scored_by
        return self.output.score

    @property
    def compared(self) -> tuple[Compared, ...]:
        """The settings that each row is asked with, in the order of their numbers."""
        if self.output.compare is None:
            return (Compared(name=self.pruning.name, pruning=self.pruning),)
        return settings_compared(self.output.compare, self.pruning)

    @property
    def audited_with(self) -> Pruning | None:
        """What some rows are asked with beside; None where there is no audit."""
        return compared("1", self.pruning).pruning if self.output.audit else None

    @property
    def text_tower_method(self) -> str | None:
        """The method in use that compares images with prompts by CLIP, if there is one."""
        used = (one.pruning for one in self.compared)
        return next((one.method for one in used if asks_for_text_tower(one)), None)

    @property
    def pruning_asked(self) -> bool:
        """Whether these settings ask for any pruning (a default retention counts)."""
        pruning = self.pruning
        return (pruning.method, pruning.encoder) != ("none", "none") and pruning.retention != 1.0

    def with_pruning_defaults(self, defaults: PruningDefaults) -> Settings:
        """The settings with a checkpoint's pruning defaults, and the built-in ones, written out.

        The shape of schedules is a matter of each retention: where other ones are compared it stays
        open, and engines fill it in.
        """
        filled = defaults.fill(self.pruning)
        if set(self.output.compare or ()) - {"1", GIVEN}:
            filled = dataclasses.replace(filled, schedule_shape=self.pruning.schedule_shape)
        return dataclasses.replace(self, pruning=filled)

    def image_policy(self) -> ImagePolicy:
        """What the images of rows may be and where they may come from."""
        return ImagePolicy(
            max_pixels=self.input.max_image_pixels,
            allow_remote=self.input.allow_remote_images,
            remote_from=self.input.remote_images_from,
            roots=self.input.image_roots,
            row_timeout=self.limits.row_timeout,
        )

    def replace(self, **changes: Any) -> Settings:
        """Other values by name, whatever their group; None stands for what is built in."""
        made: Settings = replaced(self, FIELDS, changes)
        return made

    def flat(self) -> dict[str, Any]:
        """Every setting by name, as YAML and JSON would give it back."""
        return {name: plain(_given(_alone(one, self.get(name)))) for name, one in FIELDS.items()}

    def results(self) -> dict[str, Any]:
        """Of `flat`, the settings whose values decide what the rows are."""
        return {name: value for name, value in self.flat().items() if name not in _NOT_RESULTS}

    def get(self, name: str) -> Any:
        """A setting by its name, whatever its group."""
        group = FIELDS[name].group
        return getattr(getattr(self, group) if group else self, name)


FIELDS = settings_of(Settings())
"""Every setting by name, that of its flag and of run.yaml."""
_NOT_RESULTS = {"output", "file_mb", "push_to_hub", "private", "gallery"} | {
    name for name, setting in FIELDS.items() if setting.group in ("cluster", "limits")
}


def _alone(setting: Setting, value: Any) -> Any:
    """Of values that have a flag each, one by itself and none as None."""
    if setting.value.single and len(value) < 2:
        return value[0] if value else None
    return value


def _given(value: Any) -> Any:
    """None for what nobody gave, so that a checkpoint may say it."""
    return None if isinstance(value, BuiltIn | BuiltInNumber) else value


def made_of(**values: Any) -> Settings:
    """Settings of some values by name, checked; the others as built in."""
    return Settings().replace(**values)
