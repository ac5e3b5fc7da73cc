"""A run's settings: one frozen dataclass, from flags and ``run.yaml``, and back to ``run.yaml``.

Each field carries its parser, unit and help; the command line and the file share them. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trio import bundled
from trio.engine.request import Sampling
from trio.errors import UserError
from trio.pipeline import parse
from trio.pipeline.columns import parse_mapping
from trio.pipeline.policy import MAX_PIXELS, ROW_TIMEOUT_S, ImagePolicy
from trio.pipeline.storage import check_no_secret
from trio.pruning.method_registry import names
from trio.pruning.options import (
    ENCODERS,
    FILL_UPS,
    POSITION_IDS,
    PROXY_HEADS,
    PROXY_LAYERS,
    PROXY_POSITIONS,
    Pruning,
)
from trio.pruning.pruning_config import CHOICES, PruningDefaults

DEMO = bundled.NAME
# stands for the bundled shard and the bundled model, wherever the package is installed
AUTO, LOCAL = "auto", "local"
# of --address: the Ray of this machine, and one of the job's own
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCORED = ("exact", "objects")


def option(
    default: Any,
    reader: parse.Reader,
    text: str,
    *,
    unit: str | None = None,
    results: bool = False,
    metavar: str | None = None,
) -> Any:
    """A field with what the command line needs; ``results``: another value means other rows."""
    meta = {"parse": reader, "help": text, "unit": unit, "results": results, "metavar": metavar}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Settings of an inference job; None where the job decides for itself."""

    input: tuple[str, ...] = option(
        (DEMO,),
        parse.texts,
        "Parquet file, directory or quoted pattern, s3://, gs:// or hf://datasets/ URI; several"
        " may be given; 'demo' is the bundled shard",
        results=True,
        metavar="PATH",
    )
    output: str | None = option(
        None,
        parse.text,
        "directory or URI for rows/, stats/ and the rest; a run that stopped there goes on, a"
        " finished one is left alone (default: a new directory below trio-output/)",
        metavar="DIR",
    )
    model: str = option(
        DEMO, parse.text, "model: hub id or directory; 'demo' is the bundled one", results=True
    )
    revision: str | None = option(
        None,
        parse.text,
        "commit, tag or branch of a hub id; run.yaml names the commit, which a resumed run keeps"
        " to (default: the newest of the main branch)",
        results=True,
    )
    adapters: tuple[str, ...] = option(
        (),
        parse.adapters,
        "families of models that this package does not have, as in my_vl=my_module:MyAdapter; the"
        " module must be importable where engines run (see Adding a family in the README)",
        results=True,
        metavar="TYPE=MODULE:CLASS",
    )
    prompt: str | None = option(
        None, parse.text, "prompt for rows that bring none", results=True, metavar="TEXT"
    )
    system_prompt: str | None = option(
        None,
        parse.text,
        "system message of all rows, if the model's chat template has a place for one (default: the"
        " template's own)",
        results=True,
        metavar="TEXT",
    )
    columns: str | None = option(
        None,
        parse.text,
        "names of input columns, as in image=jpg,prompt=caption_prompt; the roles are image,"
        " prompt, id and answers; id=none leaves an id column out",
        results=True,
        metavar="ROLE=COLUMN,...",
    )
    retention: float | None = option(
        None,
        parse.fraction,
        "visual tokens kept, averaged over layers, in (0, 1]; 1 is off; 1/9 may be written as such"
        " (default: 1/9 unless --schedule is given)",
        unit="fraction",
        results=True,
    )
    schedule: str | None = option(
        None,
        parse.schedule,
        "stages instead of --retention: layer:tokens kept (1:92,10:54,15:22), or layer:share of"
        " the visual tokens of each image (1:0.16,...), or a .yaml file that benchmark.py calibrate"
        " wrote, whose stages run.yaml then holds",
        results=True,
        metavar="LAYER:KEEP,...",
    )
    schedule_shape: str | None = option(
        None,
        parse.shape,
        "how --retention is spread over the layers: family (the paper's, scaled), start (the same"
        " with its first stage at layer 0) or layer:share,...@layers, as in 0:0.2,5:0.12@16"
        " (default: the checkpoint's, else family)",
        results=True,
        metavar="SHAPE",
    )
    method: str = option(
        "trio",
        parse.choice("method", names()),
        f"how visual tokens are chosen: {', '.join(names())}",
        results=True,
    )
    encoder: str = option(
        "none",
        parse.choice("encoder", ENCODERS),
        f"what reduces visual tokens in the vision encoder already: {', '.join(ENCODERS)}; the"
        " method then goes on with what is left",
        results=True,
    )
    text_tower: str | None = option(
        None,
        parse.text,
        "for --method eadp: the CLIP that the model's vision encoder comes from, hub id or"
        " directory, as openai/clip-vit-large-patch14-336 for LLaVA-1.5 (default: the demo model's"
        " own for it)",
        results=True,
        metavar="MODEL",
    )
    text_tower_revision: str | None = option(
        None,
        parse.text,
        "commit, tag or branch of a hub id given as --text-tower, as --revision",
        results=True,
        metavar="REVISION",
    )
    proxy_positions: str | None = option(
        None,
        parse.choice("proxy-positions", PROXY_POSITIONS),
        "positions whose loss gives the saliency: "
        f"{', '.join(PROXY_POSITIONS)} (default: the checkpoint's, else reference)",
        results=True,
    )
    proxy_layer: str | None = option(
        None,
        parse.choice("proxy-layer", PROXY_LAYERS),
        "layer whose loss gives the saliency: next (the one that would run next) or previous (the"
        " one that has just run) (default: the checkpoint's, else next)",
        results=True,
    )
    proxy_head: str | None = option(
        None,
        parse.choice("proxy-head", PROXY_HEADS),
        "what makes the logits of that loss: output (the model's head) or input_embedding (the"
        " matrix of token embeddings) (default: the checkpoint's, else output)",
        results=True,
    )
    similarity_threshold: float | None = option(
        None,
        parse.threshold,
        "cosine from which method trio calls two tokens the same (default: the checkpoint's, else"
        " 0.8)",
        results=True,
    )
    fill_up: str | None = option(
        None,
        parse.choice("fill-up", FILL_UPS),
        "what method trio keeps where unlike tokens are fewer than it is to keep: mixed (a quarter"
        " by saliency, the others by distance from what is kept, in features and in the picture)"
        " or reference (all by saliency, as published) (default: the checkpoint's, else mixed)",
        results=True,
    )
    position_ids: str | None = option(
        None,
        parse.choice("position-ids", POSITION_IDS),
        "positions of the tokens that stay: renumber or keep (default: the checkpoint's, else the"
        " model family's)",
        results=True,
    )
    max_new_tokens: int = option(
        64, parse.at_least(1), "longest answer", unit="tokens", results=True
    )
    temperature: float = option(
        0.0, parse.number(0.0), "0 takes the likeliest token, above 0 samples", results=True
    )
    top_p: float | None = option(
        None,
        parse.fraction,
        "with --temperature: sample from the likeliest tokens of this mass, 1 from all (default:"
        " the checkpoint's, else 1)",
        results=True,
    )
    top_k: int | None = option(
        None,
        parse.at_least(0),
        "with --temperature: sample from this many likeliest tokens, 0 from all (default: the"
        " checkpoint's, else 0)",
        unit="tokens",
        results=True,
    )
    min_p: float | None = option(
        None,
        parse.number(0.0, 1.0),
        "with --temperature: sample from tokens with at least this share of the likeliest one's"
        " probability, 0 from all (default: the checkpoint's, else 0)",
        unit="fraction",
        results=True,
    )
    repetition_penalty: float | None = option(
        None,
        parse.above(0.0),
        "divides positive logits of tokens that prompt or answer already has, multiplies negative"
        " ones; 1 is off (default: the checkpoint's, else 1)",
        unit="factor",
        results=True,
    )
    no_repeat_ngram_size: int | None = option(
        None,
        parse.at_least(0),
        "no run of so many tokens comes twice in prompt and answer; 0 is off (default: the"
        " checkpoint's, else 0)",
        unit="tokens",
        results=True,
    )
    seed: int = option(
        0, parse.at_least(0), "seed of sampling and of --method random", results=True
    )
    dtype: str = option(
        "auto",
        parse.choice("dtype", DTYPES),
        f"of the model's weights: {', '.join(DTYPES)}; auto: as saved on a GPU, float32 on a CPU",
        results=True,
    )
    min_pixels: int | None = option(
        None,
        parse.at_least(1),
        "smaller images are enlarged to this width times height before the model sees them; for"
        " models that take images at many sizes, as Qwen's (default: the processor's)",
        unit="pixels",
        results=True,
    )
    max_pixels: int | None = option(
        None,
        parse.at_least(1),
        "larger images are reduced to this width times height before the model sees them, which"
        " bounds their visual tokens; for the same models (default: the processor's)",
        unit="pixels",
        results=True,
    )
    address: str | None = option(
        None,
        parse.address,
        f"Ray to run on: {LOCAL} starts one for this job, {AUTO} joins the one of this machine,"
        " host:port joins a cluster (default: RAY_ADDRESS; without it local); for 'ray job submit'"
        " leave it out",
        metavar="RAY",
    )
    actors: int | None = option(
        None, parse.at_least(1), "engines (default: one per GPU; without GPUs 1)"
    )
    gpus_per_actor: float | None = option(
        None, parse.number(0.0), "GPUs of one engine (default: 1 where there are GPUs, else 0)"
    )
    cpus_per_actor: float = option(
        1.0, parse.number(0.0), "logical CPUs that Ray sets aside for one engine", unit="CPUs"
    )
    wait_for_nodes: float = option(
        0.0,
        parse.number(0.0),
        "above 0: nodes may join after the start (autoscaling, spot); the job begins with what"
        " there is, and fails if after this time there is no engine at all",
        unit="seconds",
    )
    threads: int | None = option(
        None,
        parse.at_least(1),
        "threads that decode and prepare images beside one engine (default: by the node's CPUs)",
    )
    batch_tokens: int | None = option(
        None,
        parse.at_least(1),
        "most prompt tokens in one prefill (default: the engine's)",
        unit="tokens",
    )
    max_running: int | None = option(
        None,
        parse.at_least(1),
        "most requests decoded together (default: the engine's)",
        unit="requests",
    )
    limit: int | None = option(
        None, parse.at_least(1), "stop after the first N rows of the input", unit="rows",
        results=True, metavar="N",
    )  # fmt: skip
    rows_per_file: int | None = option(
        None,
        parse.at_least(1),
        "rows of one work unit and output file: what is redone after a crash (default: by size)",
        unit="rows",
        results=True,
    )
    max_error_rate: float = option(
        0.5, parse.number(0.0, 1.0), "share of error rows above which the exit code is 3",
        unit="fraction",
    )  # fmt: skip
    save_kept: bool = option(
        False, parse.flag, "write the kept visual tokens of each stage", results=True
    )
    score: str | None = option(
        None,
        parse.choice("score", (*SCORED, "none")),
        "compare responses with the column answers: exact (right is what equals one of the row's"
        " answers, both in lower case, without articles and punctuation; this is not VQA's"
        " accuracy), objects (that, and for answers such as 'a red 7 and a blue 3' the share of"
        " objects named rightly) or none (default: objects for the bundled shard with its own"
        " columns, else none)",
        results=True,
        metavar="HOW",
    )
    allow_remote_images: bool = option(
        False,
        parse.flag,
        "fetch http and https URIs found in the image column, from hosts with public addresses, and"
        " what --remote-images-from names",
        results=True,
    )
    remote_images_from: tuple[str, ...] = option(
        (),
        parse.origins,
        "with --allow-remote-images: only from these schemes and hosts, as in"
        " https://images.example.org, https://*.cdn.net or s3://bucket; a host that is named in"
        " full may have a private address; proxies are not used; objects of stores (s3, gs, hf and"
        " others), which are read with the nodes' credentials, only from buckets named here"
        " (default: any public web server)",
        results=True,
        metavar="ORIGIN",
    )
    image_roots: tuple[str, ...] = option(
        (),
        parse.directories,
        "directories that paths in the image column may lead into, links followed, besides the"
        " directory of the row's shard (default: none)",
        results=True,
        metavar="DIR",
    )
    max_image_pixels: int = option(
        MAX_PIXELS,
        parse.at_least(1),
        "larger images are not decoded: their rows end in error (--max-pixels reduces images)",
        unit="pixels",
        results=True,
    )
    row_timeout: float = option(
        ROW_TIMEOUT_S,
        parse.number(0.1, 86_400),
        "for fetching and decoding the images of one row",
        unit="seconds",
    )
    compare_unpruned: bool | None = option(
        None,
        parse.flag,
        "run the same rows without pruning as well, into DIR/unpruned, and put both side by side"
        " (default: only for the bundled shard)",
    )
    stall_timeout: float = option(
        600.0, parse.number(1.0), "an engine in which nothing moves for so long is started anew",
        unit="seconds",
    )  # fmt: skip
    grace_period: float = option(
        60.0, parse.number(0.0), "for rows under way when the job is told to stop (SIGTERM)",
        unit="seconds",
    )  # fmt: skip
    log_interval: float = option(
        10.0, parse.number(0.1), "between two progress lines where output is no terminal",
        unit="seconds",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.retention is not None and self.schedule is not None:
            raise UserError("--retention and --schedule exclude each other: give one of them")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(
                f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}"
            )
        if self.remote_images_from and not self.allow_remote_images:
            raise UserError("--remote-images-from needs --allow-remote-images: give both or none")
        if self.text_tower is not None and self.method != "eadp":
            raise UserError(
                f"--text-tower goes with --method eadp only, and the method is {self.method}"
            )
        for uri in (*self.input, self.output, self.model, self.text_tower):
            if uri is not None:
                check_no_secret(uri)
        parse_mapping(self.columns or "")
        self.pruning()

    @property
    def pruning_asked(self) -> bool:
        """Whether these settings ask for any pruning (a default retention counts)."""
        return (self.method != "none" or self.encoder != "none") and self.retention != 1.0

    def pruning(self) -> Pruning:
        """The engine's pruning settings."""
        off = self.retention is None and self.schedule is None
        return Pruning(
            retention=None if off else self.retention,
            schedule=None if off else self.schedule,
            method=self.method,
            encoder=self.encoder,
            schedule_shape=self.schedule_shape,
            seed=self.seed,
            **{name: value for name in CHOICES if (value := getattr(self, name)) is not None},
        )

    def sampling(self) -> Sampling:
        """How answers are decoded; None in it is left to the checkpoint."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )

    def with_pruning_defaults(self, defaults: PruningDefaults) -> JobConfig:
        """The settings with a checkpoint's pruning defaults, and the built-in ones, written out."""
        filled = defaults.fill(self.pruning())
        changes = {name: getattr(filled, name) for name in CHOICES}
        return self.replace(**changes, schedule_shape=str(filled.schedule_shape))

    def image_policy(self) -> ImagePolicy:
        """What the images of rows may be and where they may come from."""
        return ImagePolicy(
            max_pixels=self.max_image_pixels,
            allow_remote=self.allow_remote_images,
            remote_from=self.remote_images_from,
            roots=self.image_roots,
            row_timeout=self.row_timeout,
        )

    def replace(self, **changes: Any) -> JobConfig:
        return dataclasses.replace(self, **changes)


FIELDS = {field.name: field for field in dataclasses.fields(JobConfig)}


def from_mapping(
    values: Mapping[str, Any], source: str, base: JobConfig | None = None
) -> JobConfig:
    """Settings from a mapping over ``base`` (the defaults when None).

    Raises:
        UserError: unknown keys, values of a wrong kind, settings that exclude each other.
    """
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise UserError(
            f"{source}: unknown key {unknown[0]!r}{parse.suggestion(unknown[0], FIELDS)}"
        )
    parsed = {name: _parsed(name, value, source) for name, value in values.items()}
    return dataclasses.replace(base or JobConfig(), **parsed)


def _parsed(name: str, value: Any, source: str) -> Any:
    if value is None:
        if FIELDS[name].default is None:
            return None
        raise UserError(f"{source}: {name} is empty; leave it out for its default")
    try:
        return FIELDS[name].metadata["parse"](value)
    except UserError as error:
        raise UserError(f"{source}: {name}: {error}") from error


def load(path: str) -> dict[str, Any]:
    """Keys and values of a YAML file, not yet checked.

    Raises:
        UserError: no such file, not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of the form 'key: value'")
    return values


def dump(config: JobConfig, comment: str = "") -> str:
    """Settings as the text of ``run.yaml``, which ``--config`` reads back to the same settings."""
    values = dataclasses.asdict(config)
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + body


def results(config: JobConfig) -> dict[str, Any]:
    """The settings whose values decide what the rows are, as JSON would give them back."""
    values = {n: getattr(config, n) for n, field in FIELDS.items() if field.metadata["results"]}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
