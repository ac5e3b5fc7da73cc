"""`benchmark.py speed`, `likelihood`, `cost`, `targets` and `pipeline`. What measures is imported
when it runs: no torch here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from trio.benchmark.commands import (
    DTYPES,
    Count,
    Measurement,
    NewFile,
    line,
    one_ninth,
    tell,
    write,
)
from trio.errors import UserError
from trio.job.settings import DEMO
from trio.pruning.method_registry import asks_for_text_tower
from trio.pruning.options import Pruning
from trio.values import (
    Fraction,
    Model,
    Pixels,
    Rows,
    Seed,
    Shape,
    Switch,
    Tokens,
    Value,
    listed,
    number,
    one_of,
    text,
    whole,
)

if TYPE_CHECKING:
    import torch

GOALS = "goals"
"""The part of `targets` that holds figures against what they should be."""


class Span(NamedTuple):
    """Shortest and longest answer, in tokens."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}-{self.high}" if self.low < self.high else f"{self.low}"


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


EACH_32, LARGE = Span(32, 32), Size(1008, 1008)


def _span(value: Any) -> Span:
    low, _, high = text(value).partition("-")
    span = Span(whole(1)(low), whole(1)(high or low))
    if span.low > span.high:
        raise UserError(f"{value!r} goes down; write the shorter answer first")
    return span


def _size(value: Any) -> Size:
    found = re.fullmatch(r"(\d+)x(\d+)", text(value))
    if not found or not all(map(int, found.groups())):
        raise UserError(f"{value!r} is no WIDTHxHEIGHT in pixels, as in 1008x1008")
    return Size(int(found[1]), int(found[2]))


Device = Annotated[str, Value(read=text, unit="{cpu,cuda}")]
Dtype = Annotated[str, one_of(DTYPES)]
Words = Annotated[tuple[str, ...], Value(read=listed(text), unit="NAME,...")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed(Measurement):
    """Seconds, throughput and memory of generate, engine and pruning, side by side."""

    shape: Shape = "small"
    """Random weights: tiny, small, llava-1.5-7b, llava-next-7b, llava-onevision-7b; qwen2.5-vl-7b
    and qwen3-vl-8b, with images of 36 visual tokens an edge."""
    batch: Count = 16
    """Requests, one image each, all waiting at once."""
    prompt_tokens: Tokens = 40
    """Text tokens of each prompt."""
    output_tokens: Annotated[Span, Value(read=_span, unit="TOKENS")] = EACH_32
    """Of each answer: 32, or spread evenly: 8-128."""
    pruning: Pruning = field(default_factory=Pruning)
    device: Device | None = None
    """Where to measure (default: the GPU if there is one)."""
    dtype: Dtype | None = None
    """Of the weights (default: float32; bfloat16 on a GPU)."""
    rounds: Count = 3
    """Each with a run of every row; medians are shown."""
    neighbours: Count | None = None
    """Processes that want a CPU each, beside a second run of every row in each round (default:
    none)."""
    seed: Seed = 0
    """Of words, pixels and the order of lengths."""
    json: NewFile | None = None
    """Also write conditions, ratios and rows as JSON."""
    dry_run: Switch = False
    """Print the conditions, then stop."""

    def run(self) -> int:
        import torch

        from trio.benchmark.conditions import machine
        from trio.benchmark.speed.engine_speed import Workload, compare, table

        names = ("batch", "prompt_tokens", "output_tokens", "seed")
        workload = Workload(**{name: getattr(self, name) for name in names})
        _check_encoder(self.pruning)
        pruning = one_ninth(self.pruning)
        device, dtype = device_and_dtype(self.device, self.dtype)
        conditions = {
            "shape": self.shape,
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": tuple(self.output_tokens),
            **_amount(pruning),
            "rounds": self.rounds,
            "neighbours": self.neighbours or 0,
            "seed": self.seed,
            "dtype": dtype,
            **machine(device),
        }
        print(line(conditions), flush=True)
        if self.dry_run:
            return 0
        result = compare(
            self.shape,
            workload,
            pruning,
            device=device,
            dtype=getattr(torch, dtype),
            rounds=self.rounds,
            tell=tell,
            neighbours=self.neighbours or 0,
        )
        print(table(result))
        write(self.json, {"conditions": conditions, **result})
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood(Measurement):
    """Rate of scoring given answers, beside that of answering and of a prefill for each of them."""

    shape: Shape = "small"
    """As for speed."""
    batch: Count = 16
    """Questions, one image each, all waiting at once."""
    prompt_tokens: Tokens = 40
    """Text tokens of each question."""
    candidates: Count = 4
    """Of each question, besides yes and no."""
    candidate_tokens: Tokens = 3
    """Of each candidate."""
    pruning: Pruning = field(default_factory=Pruning)
    device: Device | None = None
    """Where to measure (default: the GPU if there is one)."""
    dtype: Dtype | None = None
    """Of the weights (default: float32; bfloat16 on a GPU)."""
    rounds: Count = 3
    """Each with a run of every row; medians are shown."""
    seed: Seed = 0
    """Of words and pixels."""
    json: NewFile | None = None
    """Also write conditions, ratios and rows as JSON."""

    def run(self) -> int:
        import torch

        from trio.benchmark.conditions import machine
        from trio.benchmark.speed.engine_speed import Workload
        from trio.benchmark.speed.likelihood_speed import Candidates, compare, table

        _check_encoder(self.pruning)
        pruning = one_ninth(self.pruning)
        device, dtype = device_and_dtype(self.device, self.dtype)
        shown = ("shape", "batch", "prompt_tokens", "candidates", "candidate_tokens")
        conditions = {
            **{name: getattr(self, name) for name in shown},
            **_amount(pruning),
            "rounds": self.rounds,
            "seed": self.seed,
            "dtype": dtype,
            **machine(device),
        }
        print(line(conditions), flush=True)
        result = compare(
            self.shape,
            Workload(
                batch=self.batch,
                prompt_tokens=self.prompt_tokens,
                output_tokens=(1, 1),
                seed=self.seed,
            ),
            Candidates(count=self.candidates, tokens=self.candidate_tokens),
            pruning,
            device=device,
            dtype=getattr(torch, dtype),
            rounds=self.rounds,
            tell=tell,
        )
        print(table(result))
        write(self.json, {"conditions": conditions, **result})
        return 0


def _check_encoder(pruning: Pruning) -> None:
    if pruning.encoder != "none":
        raise UserError(f"--encoder {pruning.encoder} is not measured here; there is: none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost(Measurement):
    """FLOPs and cache of one prompt, from shapes alone: in the published sizes, or of a model."""

    model: Model | None = None
    """Directory or hub id instead of a shape; its weights are not loaded."""
    shape: Words | None = None
    """As for speed, several with commas (default: all of 7B and 8B)."""
    pruning: Pruning = field(default_factory=Pruning)
    image: Annotated[Size, Value(read=_size, unit="WIDTHxHEIGHT")] = LARGE
    """Of the one image, in pixels."""
    prompt_tokens: Tokens = 60
    """Text tokens beside it."""
    json: NewFile | None = None
    """Also write the rows as JSON."""

    def __post_init__(self) -> None:
        if self.model and self.shape:
            raise UserError("--model and --shape exclude each other: give one of them")

    def run(self) -> int:
        from trio.benchmark.shapes.sizes import PUBLISHED, blueprint, processor
        from trio.benchmark.speed.paper_cost import cost as count
        from trio.benchmark.speed.paper_cost import table
        from trio.engine.loading import load_outline

        pruning = one_ninth(self.pruning)
        if asks_for_text_tower(pruning):
            raise UserError(
                f"--method {pruning.method} is not counted: its text tower is no part of the model"
            )
        conditions = {
            "image": str(self.image),
            "prompt_tokens": self.prompt_tokens,
            **_amount(pruning),
            "method": pruning.name,
        }
        print(f"unpruned / pruned; {line(conditions)}", flush=True)
        rows = []
        for name in [self.model] if self.model else self.shape or PUBLISHED:
            outline = load_outline(name) if self.model else (blueprint(name), processor(name))
            found = count(*outline, pruning, image=self.image, prompt_tokens=self.prompt_tokens)
            rows.append((name, found))
        print(table(rows))
        found_rows = [{"shape": name, **dataclasses.asdict(found)} for name, found in rows]
        write(self.json, {"conditions": conditions, "rows": found_rows})
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets(Measurement):
    """What this device makes of the engine, in parts, and the speed that this project aims at.

    Every figure is printed, and with --json written, as soon as it is there.
    """

    parts: Words | None = None
    """Of env,parity,paged,prefill,fill,fused,profile,decode,graphs,admission,goals; goals are whole
    comparisons with `generate`, as of speed, and take longest (default: all)."""
    seconds: Annotated[float, Value(read=number(above=0), unit="SECONDS")] = math.inf
    """That all may take; what would not fit is left out, and that is said (default: no limit)."""
    shape: Shape | None = None
    """Of prefill, fill, profile and decode (default: llava-next-7b; small on a CPU)."""
    device: Device | None = None
    """Where to measure (default: the GPU if there is one)."""
    dtype: Dtype | None = None
    """Of the weights (default: float32; bfloat16 on a GPU)."""
    rounds: Count = 3
    """Each with a run of every row; medians are shown."""
    json: NewFile | None = None
    """Also write conditions, figures and all rows."""
    dry_run: Switch = False
    """Print what would be measured, then stop."""

    def run(self) -> int:
        import torch

        from trio.benchmark.conditions import machine
        from trio.benchmark.speed.device import PARTS, Bench
        from trio.benchmark.speed.device import run as figures
        from trio.benchmark.speed.targets import RUNS, parity_row, table

        asked = self._asked([*PARTS, GOALS])
        device, dtype = device_and_dtype(self.device, self.dtype)
        shape = self.shape or ("small" if device.type == "cpu" else "llava-next-7b")
        bench = Bench(shape, device, getattr(torch, dtype), self.seconds)
        runs = RUNS[device.type] if GOALS in asked else ()
        conditions = {"shape": shape, "rounds": self.rounds, "dtype": dtype, **machine(device)}
        print(line(conditions), flush=True)
        if self.dry_run:
            parts = [part for part in PARTS if part in asked]
            print("\n".join([*parts, *(run.name for run in runs)]))
            return 0
        found: dict[str, Any] = {
            "conditions": conditions, "figures": [], "targets": [], "runs": {},
        }  # fmt: skip
        for figure in figures(bench, asked):
            print(_shown(figure), flush=True)
            found["figures"].append(figure)
            if figure["part"] == "parity" and figure.get("dtype") == "float32":
                found["targets"].append(parity_row(figure))
            write(self.json, found)
        for run in runs:
            self._goal(run, bench, found)
        if found["targets"]:
            print(table(found["targets"]))
        failed = [figure["part"] for figure in found["figures"] if "failed" in figure]
        if failed:
            tell(f"failed: {', '.join(failed)}")
        return 1 if failed else 0

    def _asked(self, there: list[str]) -> list[str]:
        """The parts to measure, of those that there are."""
        asked = list(self.parts or there)
        unknown = [part for part in asked if part not in there]
        if unknown:
            raise UserError(
                f"--parts {','.join(unknown)} is not available; there are: {', '.join(there)}"
            )
        return asked

    def _goal(self, run: Any, bench: Any, found: dict[str, Any]) -> None:
        """One whole comparison, held against what it should give; written at once."""
        from trio.benchmark.speed.engine_speed import Workload, compare
        from trio.benchmark.speed.engine_speed import table as speed_table

        if bench.left_s <= 0:
            found["figures"].append({"part": GOALS, "skipped": run.name})
            write(self.json, found)
            tell(f"left out, as --seconds {self.seconds:g} are over: {run.name}")
            return
        tell(run.name)
        result = compare(
            run.shape,
            Workload(batch=run.batch, prompt_tokens=40, output_tokens=run.output_tokens),
            Pruning(retention=1 / 9),
            device=bench.device,
            dtype=bench.dtype,
            rounds=self.rounds,
            tell=tell,
        )
        print(f"{run.name}\n{speed_table(result)}\n", flush=True)
        found["runs"][run.name] = result
        found["targets"] += [target.row(run.name, result) for target in run.targets]
        write(self.json, found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline(Measurement):
    """The whole Ray job beside its engine alone, and the job's own ceiling in rows per second."""

    model: Model = DEMO
    """Of the real engine: hub id, directory, or demo."""
    retention: Fraction = 1 / 9
    """Layer-average share that it keeps (default: 1/9)."""
    rows: Rows = 240
    """That the real engine answers, in the job and alone."""
    instant_rows: Rows = 32768
    """Of the job whose engine answers at once."""
    image_size: Pixels = 64
    """Pixels a side of the latter's JPEG images."""
    rounds: Count = 3
    """Each with a run of every row; medians are shown."""
    seed: Seed = 0
    """Of the scenes."""
    json: NewFile | None = None
    """Also write conditions, figures and rows as JSON."""
    dry_run: Switch = False
    """Print the conditions, then stop."""

    def run(self) -> int:
        import torch

        from trio.benchmark.conditions import machine
        from trio.benchmark.speed.job_speed import (
            Workload,
            check,
            measure,
            summary,
            surroundings,
            table,
        )

        names = [one.name for one in dataclasses.fields(Workload)]
        workload = Workload(**{name: getattr(self, name) for name in names})
        check(workload)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        conditions = {
            **dataclasses.asdict(workload),
            "rounds": self.rounds,
            **machine(device),
            **surroundings(),
        }
        print(line(conditions), flush=True)
        if self.dry_run:
            return 0
        result = summary(list(measure(workload, self.rounds)))
        print(table(result))
        write(self.json, {"conditions": conditions, **result})
        return 0


def _amount(pruning: Pruning) -> dict[str, Any]:
    """Of a measurement's conditions."""
    schedule = None if pruning.schedule is None else str(pruning.schedule)
    return {"method": pruning.method, "retention": pruning.retention, "schedule": schedule}


def _shown(figure: Mapping[str, Any]) -> str:
    """A figure of `targets` in a line, without what is only for its file."""
    short = {name: one for name, one in figure.items() if name not in ("trace", "dearest")}
    return line(
        {name: f"{one:.4g}" if isinstance(one, float) else one for name, one in short.items()}
    )


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """Where to measure, and in which dtype."""
    import torch

    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if (device or "cpu").partition(":")[0] not in there:
        raise UserError(f"--device {device} is not to be had here; there is: {', '.join(there)}")
    place = torch.device(device or there[-1])
    return place, dtype or ("float32" if place.type == "cpu" else "bfloat16")
