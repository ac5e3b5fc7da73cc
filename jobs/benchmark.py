"""Measure what pruning keeps and costs. `benchmark.py quality --help` lists the settings."""

from __future__ import annotations

import _bootstrap  # noqa: F401  # isort: skip

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio.bundled import CLIP, is_bundled
from trio.demo import MODEL
from trio.errors import UserError, first_line
from trio.pipeline import parse
from trio.pipeline.cli import WRONG, Parser, add_flags, fail, settings_from
from trio.pipeline.config import DEMO
from trio.pruning.method_registry import names
from trio.pruning.options import ENCODERS, Pruning

if TYPE_CHECKING:
    import torch

    from trio.benchmark.quality.comparison import Setting

CALIBRATE = (
    "input", "model", "revision", "adapters", "prompt", "system_prompt", "columns", "retention",
    "schedule_shape", "method", "encoder", "proxy_positions", "proxy_layer", "proxy_head",
    "similarity_threshold", "fill_up", "position_ids",
    "max_new_tokens", "seed", "dtype", "min_pixels", "max_pixels", "allow_remote_images",
    "remote_images_from", "image_roots", "max_image_pixels", "row_timeout",
)  # fmt: skip
"""Settings of the jobs that `calibrate` has, too."""
GOALS = "goals"
"""The part of `targets` that holds figures against what they should be."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except UserError as error:
        return fail("benchmark.py", str(error), WRONG)


def quality(options: argparse.Namespace) -> int:
    """Exact answers on held-out scenes, and what reading costs, by method, encoder and retention.

    Settings that the model cannot have, a retention out of reach say, are named and left out.
    """
    from trio.benchmark.quality import plots
    from trio.benchmark.quality.comparison import check_scenes, in_reach, settings
    from trio.engine.loading import load_outline
    from trio.families.registry import adapt

    _check_file(options.json)
    if options.plot:
        plots.check(options.plot)
    if options.from_file:
        return _show(_read(options.from_file), options)
    check_scenes(options.scenes, options.seed)
    bundled = is_bundled(options.model)
    asked_for = settings(
        options.methods,
        options.retention,
        options.encoders,
        _proxies(options),
        options.position_ids or [None],
        options.seed[0],
        options.schedule_shape,
    )
    conditions: dict[str, Any] = {
        "model": DEMO if bundled else options.model,
        "dtype": options.dtype,
        "scenes": options.scenes,
        "questions": "every scene" if options.every_scene else "every second scene",
        "seeds": options.seed,
    }
    options.text_tower = options.text_tower or _demo_text_tower(options.model)
    rows, left_out = in_reach(
        adapt(load_outline(options.model)[0]),
        asked_for,
        has_text_tower=options.text_tower is not None,
    )
    for one in left_out:
        _tell(f"left out: {one['label']} at {one['retention']:.4g}: {one['reason']}")
    if options.dry_run:
        print(_line(conditions))
        print("\n".join(f"{row.label}, retention {row.pruning.retention:.4g}" for row in rows))
        return 0
    return _show(_measure_quality(options, conditions, rows, left_out), options)


def _demo_text_tower(model: str) -> str | None:
    """Of the bundled model; None for others."""
    return str(CLIP) if is_bundled(model) and CLIP.is_dir() else None


def _measure_quality(
    options: argparse.Namespace,
    conditions: dict[str, Any],
    rows: Sequence[Setting],
    left_out: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the JSON file holds; it is written after every setting."""
    from trio.benchmark.conditions import machine
    from trio.benchmark.progress_line import Clock
    from trio.benchmark.quality.comparison import ask, describe, measure
    from trio.benchmark.quality.quality_table import share
    from trio.engine.loading import load, load_text_tower

    asked = ask(options.scenes, options.seed, every=options.every_scene)
    model, processor = load(options.model, device=None, dtype=options.dtype)
    text_tower = None
    if any(row.pruning.method == "eadp" for row in rows):
        text_tower = load_text_tower(model, options.text_tower)
    conditions |= {"settings": len(rows), **machine(model.device)}
    print(describe(model, len(asked), conditions), flush=True)
    done: list[dict[str, Any]] = []
    found = {"conditions": conditions, "left_out": left_out, "rows": done}
    clock = Clock(len(rows))
    found_rows = measure(model, processor, asked, rows, seed=options.seed[0], text_tower=text_tower)
    for row in found_rows:
        done.append(row)
        _write(options.json, found)
        _tell(f"{clock.lap()}: {row['label']} at {share(row['retention'])}")
    return found


def _show(found: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Print the table of a JSON file and draw its plot."""
    from trio.benchmark.quality import plots
    from trio.benchmark.quality.quality_table import NOTE, STAGES_NOTE, stages_table, table

    print(table(found["rows"], as_markdown=options.markdown))
    print(f"\n{NOTE}")
    if all("fill_up_share" in row for row in found["rows"]):
        print(f"\n{stages_table(found['rows'], as_markdown=options.markdown)}\n\n{STAGES_NOTE}")
    if options.plot:
        plots.draw(found["rows"], options.plot)
    return 0


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that `quality` wrote."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--from {path}: {first_line(error)}") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not rows or not all("by_kind" in row for row in rows):
        raise UserError(f"--from {path}: this is no file that quality --json has written")
    return found


def _proxies(options: argparse.Namespace) -> list[dict[str, str | None]]:
    """Every combination of the proxy's settings; None is the checkpoint's."""
    positions = options.proxy_positions or [None]
    names = ("proxy_positions", "proxy_layer", "proxy_head", "fill_up")
    combined = product(positions, options.proxy_layer, options.proxy_head, options.fill_up)
    return [dict(zip(names, values, strict=True)) for values in combined]


def speed(options: argparse.Namespace) -> int:
    """Seconds, throughput and memory of generate, engine and pruning, side by side."""
    import torch

    from trio.benchmark.conditions import machine
    from trio.benchmark.speed.engine_speed import Workload, compare, table

    workload = Workload(
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        seed=options.seed,
    )
    if options.encoder != "none":
        raise UserError(f"--encoder {options.encoder} is not measured here; there is: none")
    pruning = _pruning(options)
    _check_file(options.json)
    device, dtype = _device(options)
    conditions = {
        "shape": options.shape,
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "method": pruning.method,
        "retention": pruning.retention,
        "schedule": options.schedule,
        "rounds": options.rounds,
        "neighbours": options.neighbours,
        "seed": options.seed,
        "dtype": dtype,
        **machine(device),
    }
    print(_line(conditions), flush=True)
    if options.dry_run:
        return 0
    result = compare(
        options.shape,
        workload,
        pruning,
        device=device,
        dtype=getattr(torch, dtype),
        rounds=options.rounds,
        tell=_tell,
        neighbours=options.neighbours,
    )
    print(table(result))
    _write(options.json, {"conditions": conditions, **result})
    return 0


def cost(options: argparse.Namespace) -> int:
    """FLOPs and cache of one prompt, from shapes alone: in the published sizes, or of a model."""
    from trio.benchmark.shapes.sizes import PUBLISHED, blueprint, processor
    from trio.benchmark.speed.paper_cost import cost as count
    from trio.benchmark.speed.paper_cost import table
    from trio.engine.loading import load_outline

    pruning = _pruning(options)
    if pruning.method == "eadp":
        raise UserError("--method eadp is not counted: its text tower is no part of the model")
    _check_file(options.json)
    conditions = {
        "image": "x".join(map(str, options.image)),
        "prompt_tokens": options.prompt_tokens,
        "method": pruning.name,
        "retention": pruning.retention,
        "schedule": options.schedule,
    }
    print(f"unpruned / pruned; {_line(conditions)}", flush=True)
    rows = []
    for name in [options.model] if options.model else options.shape or PUBLISHED:
        model, prepare = load_outline(name) if options.model else (blueprint(name), processor(name))
        found = count(
            model,
            prepare,
            pruning,
            image=options.image,
            prompt_tokens=options.prompt_tokens,
        )
        rows.append((name, found))
    print(table(rows))
    found_rows = [{"shape": name, **dataclasses.asdict(found)} for name, found in rows]
    _write(options.json, {"conditions": conditions, "rows": found_rows})
    return 0


def targets(options: argparse.Namespace) -> int:
    """What this device makes of the engine, in parts, and the speed that this project aims at.

    Every figure is printed, and with --json written, as soon as it is there.
    """
    import torch

    from trio.benchmark.conditions import machine
    from trio.benchmark.speed.device import PARTS, Bench
    from trio.benchmark.speed.device import run as figures
    from trio.benchmark.speed.engine_speed import Workload, compare
    from trio.benchmark.speed.engine_speed import table as speed_table
    from trio.benchmark.speed.targets import RUNS, parity_row, table

    there = [*PARTS, GOALS]
    asked = options.parts or there
    unknown = [part for part in asked if part not in there]
    if unknown:
        raise UserError(
            f"--parts {','.join(unknown)} is not available; there are: {', '.join(there)}"
        )
    _check_file(options.json)
    device, dtype = _device(options)
    shape = options.shape or ("small" if device.type == "cpu" else "llava-next-7b")
    bench = Bench(shape, device, getattr(torch, dtype), options.seconds)
    runs = RUNS[device.type] if GOALS in asked else ()
    conditions = {"shape": shape, "rounds": options.rounds, "dtype": dtype, **machine(device)}
    print(_line(conditions), flush=True)
    if options.dry_run:
        parts = [part for part in PARTS if part in asked]
        print("\n".join([*parts, *(run.name for run in runs)]))
        return 0
    found: dict[str, Any] = {"conditions": conditions, "figures": [], "targets": [], "runs": {}}
    for figure in figures(bench, asked):
        print(_shown(figure), flush=True)
        found["figures"].append(figure)
        if figure["part"] == "parity" and figure.get("dtype") == "float32":
            found["targets"].append(parity_row(figure))
        _write(options.json, found)
    for run in runs:
        if bench.left_s <= 0:
            found["figures"].append({"part": GOALS, "skipped": run.name})
            _write(options.json, found)
            _tell(f"left out, as --seconds {options.seconds:g} are over: {run.name}")
            continue
        _tell(run.name)
        workload = Workload(batch=run.batch, prompt_tokens=40, output_tokens=run.output_tokens)
        result = compare(
            run.shape,
            workload,
            Pruning(retention=1 / 9),
            device=device,
            dtype=getattr(torch, dtype),
            rounds=options.rounds,
            tell=_tell,
        )
        print(f"{run.name}\n{speed_table(result)}\n", flush=True)
        found["runs"][run.name] = result
        found["targets"] += [target.row(run.name, result) for target in run.targets]
        _write(options.json, found)
    if found["targets"]:
        print(table(found["targets"]))
    failed = [figure["part"] for figure in found["figures"] if "failed" in figure]
    if failed:
        _tell(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _shown(figure: Mapping[str, Any]) -> str:
    """A figure of `targets` in a line, without what is only for its file."""
    short = {name: one for name, one in figure.items() if name not in ("trace", "dearest")}
    return _line(
        {name: f"{one:.4g}" if isinstance(one, float) else one for name, one in short.items()}
    )


def _pruning(options: argparse.Namespace) -> Pruning:
    """One ninth, unless the flags say something."""
    retention = options.retention
    if retention is None and options.schedule is None:
        retention = 1 / 9
    return Pruning(
        retention=retention,
        schedule=options.schedule,
        method=options.method,
        encoder=options.encoder,
    )


def _device(options: argparse.Namespace) -> tuple[torch.device, str]:
    """Where to measure, and in which dtype."""
    import torch

    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if (options.device or "cpu").partition(":")[0] not in there:
        raise UserError(
            f"--device {options.device} is not to be had here; there is: {', '.join(there)}"
        )
    device = torch.device(options.device or there[-1])
    return device, options.dtype or ("float32" if device.type == "cpu" else "bfloat16")


def calibrate(options: argparse.Namespace) -> int:
    """A schedule searched for on one's own images, by least divergence from the unpruned model."""
    from trio.benchmark.quality import pruning_file
    from trio.benchmark.quality.calibrate import Plan, check_file, dump, resolved, table
    from trio.benchmark.quality.calibrate import calibrate as search

    config = settings_from(options)
    plan = Plan.of(resolved(config), options.rows)
    file = check_file(options.file)
    defaults = file.name == pruning_file.FILE
    if defaults:
        pruning_file.check(file, plan.pruning)
    print(plan, flush=True)
    if options.dry_run:
        return 0
    report = search(plan, _tell)
    print(table(report))
    text = pruning_file.merged(file, report, plan.pruning) if defaults else dump(report)
    file.write_text(text, encoding="utf-8")
    print(f"written: {file}")
    return 0


def _line(conditions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: Path | None, result: object) -> None:
    if path is not None:
        # In one go: what a run has so far may be read, and must outlive its interruption.
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)


def pipeline(options: argparse.Namespace) -> int:
    """The whole Ray job beside its engine alone, and the job's own ceiling in rows per second."""
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

    workload = Workload(
        model=options.model,
        retention=options.retention,
        rows=options.rows,
        instant_rows=options.instant_rows,
        image_size=options.image_size,
        seed=options.seed,
    )
    check(workload)
    _check_file(options.json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = {
        **dataclasses.asdict(workload),
        "rounds": options.rounds,
        **machine(device),
        **surroundings(),
    }
    print(_line(conditions), flush=True)
    if options.dry_run:
        return 0
    result = summary(list(measure(workload, options.rounds)))
    print(table(result))
    _write(options.json, {"conditions": conditions, **result})
    return 0


def _check_file(path: Path | None) -> None:
    """A measurement takes long, and is written at its end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json {path}: no file can be written there; name one in a directory")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, add in (
        (quality, _add_quality),
        (speed, _add_speed),
        (cost, _add_cost),
        (targets, _add_targets),
        (pipeline, _add_pipeline),
        (calibrate, _add_calibrate),
    ):
        add(commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__))
    return parser


def _add_quality(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.set_defaults(
        run=quality,
        model=str(MODEL),
        text_tower=None,
        methods=list(names()),
        encoders=["none"],
        retention=[1 / 3, 2 / 9, 1 / 9],
        proxy_positions=None,
        proxy_layer=[None],
        proxy_head=[None],
        fill_up=[None],
        position_ids=None,
        schedule_shape=[None],
        scenes=300,
        every_scene=False,
        seed=[7],
        dtype="float32",
        json=None,
        from_file=None,
        plot=None,
        markdown=False,
        dry_run=False,
    )
    add("--model", help="hub id, directory, or 'demo' (default: demo, the bundled one)")
    add("--text-tower", help="for method eadp: the CLIP of the model's vision encoder")
    add("--methods", type=_words, help=f"of {','.join(names())} (default: all of them)")
    add("--encoders", type=_words, help=f"of {','.join(ENCODERS)} (default: none)")
    add("--retention", type=_fractions, help="layer-average shares kept (default: 1/3,2/9,1/9)")
    add(
        "--proxy-positions",
        type=_words,
        help="reference,with_last,last (default: as caption.py)",
    )
    add("--proxy-layer", type=_words, help="next,previous (default: as caption.py)")
    add("--proxy-head", type=_words, help="output,input_embedding (default: as caption.py)")
    add("--fill-up", type=_words, help="mixed,reference, of method trio (default: as caption.py)")
    add("--position-ids", type=_words, help="renumber,keep (default: as caption.py)")
    add(
        "--schedule-shape",
        nargs="+",
        type=_shape,
        metavar="SHAPE",
        help="one or more of family, start, 0:0.16,10:0.09@32, as for caption.py; in labels start "
        "is 'from layer 0' (default: the model's)",
    )
    add("--scenes", type=int, help="of each seed; a caption of each, a question of half (300)")
    add("--every-scene", action="store_true", help="a question of every scene instead of half")
    add(
        "--seed",
        type=_integers,
        help="of the scenes, several with commas; the first also of random pruning and of the "
        "bootstrap (default: 7)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--json", type=Path, metavar="FILE", help="also write all figures, after every setting")
    add(
        "--from",
        dest="from_file",
        type=Path,
        metavar="FILE",
        help="show what such a file holds, and measure nothing",
    )
    add("--plot", type=Path, metavar="FILE.png", help="also draw what is kept over what it costs")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--dry-run", action="store_true", help="print what would be measured, then stop")


def _add_speed(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.set_defaults(
        run=speed,
        shape="small",
        batch=16,
        prompt_tokens=40,
        output_tokens=(32, 32),
        method="trio",
        retention=None,
        schedule=None,
        encoder="none",
        device=None,
        dtype=None,
        rounds=3,
        neighbours=0,
        seed=0,
        json=None,
        dry_run=False,
    )
    add(
        "--shape",
        help="random weights: tiny, small, llava-1.5-7b, llava-next-7b, llava-onevision-7b; "
        "qwen2.5-vl-7b and qwen3-vl-8b, with images of 36 visual tokens an edge (small)",
    )
    add("--batch", type=_positive, help="requests, one image each, all waiting at once (16)")
    add("--prompt-tokens", type=_positive, help="text tokens of each prompt (40)")
    add("--output-tokens", type=_range, help="of each answer: 32, or spread evenly: 8-128 (32)")
    add("--retention", type=_fraction, help="layer-average share kept (1/9)")
    add("--schedule", type=_schedule, help="stages instead: 1:92,10:54,15:22, or a .yaml file")
    add("--method", help="trio, gradient, random, fastv or divprune (trio)")
    add("--encoder", help="only none in this version")
    _add_where(add)
    add(
        "--neighbours",
        type=_positive,
        metavar="N",
        help="processes that want a CPU each, beside a second run of every row in each round",
    )
    add("--seed", type=int, help="of words, pixels and the order of lengths (0)")
    add("--json", type=Path, metavar="FILE", help="also write conditions, ratios and rows as JSON")
    add("--dry-run", action="store_true", help="print the conditions, then stop")


def _add_cost(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.set_defaults(
        run=cost,
        model=None,
        shape=None,
        method="trio",
        encoder="none",
        retention=None,
        schedule=None,
        image=(1008, 1008),
        prompt_tokens=60,
        json=None,
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--model", help="directory or hub id; its weights are not loaded")
    either.add_argument(
        "--shape", type=_words, help="as for speed, several with commas (all of 7B and 8B)"
    )
    add("--retention", type=_fraction, help="layer-average share kept (1/9)")
    add("--schedule", type=_schedule, help="stages instead: 1:436,10:255,15:173, or a .yaml file")
    add("--method", help="trio, gradient, random, fastv, divprune or none (trio)")
    add("--encoder", help="visionzip or scan, before the method (none)")
    add("--image", type=_size, help="width and height of the one image, in pixels (1008x1008)")
    add("--prompt-tokens", type=_positive, help="text tokens beside it (60)")
    add("--json", type=Path, metavar="FILE", help="also write the rows as JSON")


def _add_where(add: Callable[..., object]) -> None:
    """Flags of what compares the four ways."""
    add("--device", help="cpu or cuda (the GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(float32; bfloat16 on a GPU)")
    add("--rounds", type=_positive, help="each with a run of every row; medians are shown (3)")


def _add_targets(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.set_defaults(
        run=targets,
        parts=None,
        seconds=math.inf,
        shape=None,
        device=None,
        dtype=None,
        rounds=3,
        json=None,
        dry_run=False,
    )
    add(
        "--parts",
        type=_words,
        help="of env,parity,prefill,fill,profile,decode,goals; goals are whole comparisons with "
        "`generate`, as of speed, and take longest (all)",
    )
    add(
        "--seconds",
        type=_seconds,
        help="that all may take; what would not fit is left out, and that is said (no limit)",
    )
    add("--shape", help="of prefill, fill, profile and decode (llava-next-7b; small on a CPU)")
    _add_where(add)
    add("--json", type=Path, metavar="FILE", help="also write conditions, figures and all rows")
    add("--dry-run", action="store_true", help="print what would be measured, then stop")


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.set_defaults(
        run=pipeline,
        model=DEMO,
        retention=1 / 9,
        rows=240,
        instant_rows=32768,
        image_size=64,
        rounds=3,
        seed=0,
        json=None,
        dry_run=False,
    )
    add("--model", help="of the real engine: hub id, directory, or 'demo' (demo)")
    add("--retention", type=_fraction, help="layer-average share that it keeps (1/9)")
    add("--rows", type=_positive, help="that the real engine answers, in the job and alone (240)")
    add("--instant-rows", type=_positive, help="of the job whose engine answers at once (32768)")
    add("--image-size", type=_positive, help="pixels a side of the latter's JPEG images (64)")
    add("--rounds", type=_positive, help="each with a run of every row; medians are shown (3)")
    add("--seed", type=int, help="of the scenes (0)")
    add("--json", type=Path, metavar="FILE", help="also write conditions, figures and rows as JSON")
    add("--dry-run", action="store_true", help="print the conditions, then stop")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=calibrate, rows=64, file=None)
    add_flags(parser, CALIBRATE)
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--rows", type=_positive, help="of the input, drawn with --seed; half are held out (64)")
    add(
        "--output",
        type=Path,
        dest="file",
        metavar="FILE",
        help="what to write: a schedule file ending in .yaml, or a pruning_config.json",
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _fractions(text: str) -> list[float]:
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers or fractions") from None


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers") from None


def _fraction(text: str) -> float:
    values = _fractions(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return values[0]


def _schedule(text: str) -> str:
    try:
        return parse.schedule(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _shape(text: str) -> str:
    try:
        Pruning(schedule_shape=text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _seconds(text: str) -> float:
    value = _fraction(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds above 0")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    bounds = _positive(low), _positive(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} goes down; write the shorter answer first")
    return bounds


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(map(int, found.groups())):
        raise argparse.ArgumentTypeError(f"{text!r} is no WIDTHxHEIGHT in pixels, as in 1008x1008")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main())
