"""`benchmark.py quality` and `calibrate`. What measures is imported when it runs: no torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from trio.benchmark.commands import DTYPES, Count, File, Measurement, NewFile, line, tell, write
from trio.bundled import CLIP, is_bundled
from trio.errors import UserError, first_line
from trio.job import cli
from trio.job.flags import Group
from trio.job.settings import DEMO, Settings
from trio.pruning.method_registry import asks_for_text_tower, method_names
from trio.pruning.options import (
    ENCODERS,
    FILL_UPS,
    POSITION_IDS,
    PROXY_HEADS,
    PROXY_LAYERS,
    PROXY_POSITIONS,
    read_method,
)
from trio.pruning.schedule import read_shape
from trio.values import (
    Model,
    Switch,
    Value,
    listed,
    many,
    number,
    one_of,
    settings_of,
    whole,
)

if TYPE_CHECKING:
    from trio.benchmark.quality.comparison import Setting


def _shape(value: Any) -> str:
    return str(read_shape(value))


def _words(known: Sequence[str]) -> Value:
    return Value(read=listed(one_of(known).read), unit=",".join(known))


METHODS = Value(read=listed(read_method), unit=lambda: ",".join(method_names()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality(Measurement):
    """Exact answers on held-out scenes, and what reading costs, by method, encoder and retention.

    Settings that the model cannot have, a retention out of reach say, are named and left out.
    """

    model: Model = DEMO
    """Hub id, directory, or demo, the bundled one."""
    text_tower: Model | None = None
    """For methods eadp and cdpruner: the CLIP of the model's vision encoder."""
    methods: Annotated[tuple[str, ...], METHODS] = field(default_factory=method_names)
    """How tokens are chosen, several with commas (default: all)."""
    encoders: Annotated[tuple[str, ...], _words(ENCODERS)] = ("none",)
    """What reduces them in the encoder, several with commas."""
    retention: Annotated[
        tuple[float, ...], Value(read=listed(number(above=0, most=1)), unit="FRACTION,...")
    ] = (1 / 3, 2 / 9, 1 / 9)
    """Shares kept, averaged over the layers (default: 1/3,2/9,1/9)."""
    proxy_positions: Annotated[tuple[str, ...] | None, _words(PROXY_POSITIONS)] = None
    """As for caption.py, several with commas (default: the checkpoint's)."""
    proxy_layer: Annotated[tuple[str, ...] | None, _words(PROXY_LAYERS)] = None
    """As for caption.py, several with commas (default: the checkpoint's)."""
    proxy_head: Annotated[tuple[str, ...] | None, _words(PROXY_HEADS)] = None
    """As for caption.py, several with commas (default: the checkpoint's)."""
    fill_up: Annotated[tuple[str, ...] | None, _words(FILL_UPS)] = None
    """Of method trio, as for caption.py, several with commas (default: the checkpoint's)."""
    position_ids: Annotated[tuple[str, ...] | None, _words(POSITION_IDS)] = None
    """As for caption.py, several with commas (default: the checkpoint's)."""
    schedule_shape: Annotated[tuple[str, ...] | None, many(_shape, "SHAPE")] = None
    """One or more of family, start, 0:0.16,10:0.09@32, as for caption.py; in labels start is "from
    layer 0" (default: the checkpoint's)."""
    scenes: Count = 300
    """Scenes of each seed; a caption of each, a question of half."""
    every_scene: Switch = False
    """A question of every scene instead of half."""
    seed: Annotated[tuple[int, ...], Value(read=listed(whole(0)), unit="SEED,...")] = (7,)
    """Of the scenes, several with commas; the first also of random pruning and of the bootstrap."""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """Of the weights."""
    json: NewFile | None = None
    """Also write all figures, after every setting."""
    from_: File | None = None
    """Show what such a file holds, and measure nothing."""
    plot: Annotated[Path | None, Value(read=Path, unit="FILE.png")] = None
    """Also draw what is kept over what it costs."""
    markdown: Switch = False
    """Print the table as Markdown."""
    dry_run: Switch = False
    """Print what would be measured, then stop."""

    def run(self) -> int:
        from trio.benchmark.quality import plots
        from trio.benchmark.quality.comparison import check_scenes

        if self.plot:
            plots.check(self.plot)
        if self.from_:
            return self._show(_read(self.from_))
        check_scenes(self.scenes, list(self.seed))
        conditions: dict[str, Any] = {
            "model": DEMO if is_bundled(self.model) else self.model,
            "dtype": self.dtype,
            "scenes": self.scenes,
            "questions": "every scene" if self.every_scene else "every second scene",
            "seeds": list(self.seed),
        }
        rows, left_out = self._in_reach()
        for one in left_out:
            tell(f"left out: {one['label']} at {one['retention']:.4g}: {one['reason']}")
        if self.dry_run:
            print(line(conditions))
            print("\n".join(f"{row.label}, retention {row.pruning.retention:.4g}" for row in rows))
            return 0
        return self._show(self._measure(conditions, rows, left_out))

    @property
    def _text_tower(self) -> str | None:
        own = str(CLIP) if is_bundled(self.model) and CLIP.is_dir() else None
        return self.text_tower or own

    def _in_reach(self) -> tuple[list[Setting], list[dict[str, Any]]]:
        """What to measure, and what the model cannot have."""
        from trio.benchmark.quality.comparison import in_reach, settings
        from trio.engine.loading import load_outline
        from trio.families.registry import adapt

        asked = settings(
            self.methods,
            self.retention,
            self.encoders,
            self._proxies(),
            self.position_ids or [None],
            self.seed[0],
            self.schedule_shape or [None],
        )
        adapter = adapt(load_outline(self.model)[0])
        return in_reach(adapter, asked, has_text_tower=self._text_tower is not None)

    def _proxies(self) -> list[dict[str, str | None]]:
        """Every combination of the proxy's settings; None is the checkpoint's."""
        names = ("proxy_positions", "proxy_layer", "proxy_head", "fill_up")
        combined = product(*(getattr(self, name) or [None] for name in names))
        return [dict(zip(names, values, strict=True)) for values in combined]

    def _measure(
        self,
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

        asked = ask(self.scenes, list(self.seed), every=self.every_scene)
        model, processor = load(self.model, device=None, dtype=self.dtype)
        text_tower = None
        if any(asks_for_text_tower(row.pruning) for row in rows):
            assert self._text_tower is not None, "without one, `in_reach` leaves these out"
            text_tower = load_text_tower(model, self._text_tower)
        conditions |= {"settings": len(rows), **machine(model.device)}
        print(describe(model, len(asked), conditions), flush=True)
        done: list[dict[str, Any]] = []
        found = {"conditions": conditions, "left_out": left_out, "rows": done}
        clock = Clock(len(rows))
        found_rows = measure(
            model, processor, asked, rows, seed=self.seed[0], text_tower=text_tower
        )
        for row in found_rows:
            done.append(row)
            write(self.json, found)
            tell(f"{clock.lap()}: {row['label']} at {share(row['retention'])}")
        return found

    def _show(self, found: Mapping[str, Any]) -> int:
        """Print the table of a JSON file and draw its plot."""
        from trio.benchmark.quality import plots
        from trio.benchmark.quality.quality_table import NOTE, STAGES_NOTE, stages_table, table

        print(table(found["rows"], as_markdown=self.markdown))
        print(f"\n{NOTE}")
        if all("fill_up_share" in row for row in found["rows"]):
            print(f"\n{stages_table(found['rows'], as_markdown=self.markdown)}\n\n{STAGES_NOTE}")
        if self.plot:
            plots.draw(found["rows"], self.plot)
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
    return dict(found)


OF_JOB = (
    "input", "model", "revision", "adapters", "prompt", "system_prompt", "columns", "retention",
    "schedule_shape", "method", "encoder", "proxy_positions", "proxy_layer", "proxy_head",
    "similarity_threshold", "fill_up", "position_ids",
    "max_new_tokens", "seed", "dtype", "min_pixels", "max_pixels", "allow_remote_images",
    "remote_images_from", "image_roots", "max_image_pixels", "row_timeout",
)  # fmt: skip
"""Settings of a job that `calibrate` has, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrate(Measurement):
    """A schedule searched for on one's own images, by least divergence from the unpruned model."""

    rows: Count = 64
    """Rows of the input, drawn with --seed; half are held out."""
    output: File | None = None
    """What to write: a schedule file ending in .yaml, or a pruning_config.json."""
    job: Settings = field(default_factory=Settings)
    """Of which `OF_JOB` can be given."""
    dry_run: bool = False

    @classmethod
    def groups(cls) -> list[Group]:
        return cli.groups(OF_JOB, also=settings_of(cls(), inner=False).values())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        rest = dict(given)
        names = [*settings_of(cls(), inner=False), "dry_run"]
        own = {name: rest.pop(name) for name in names if name in rest}
        return cls(job=cli.settings_from(rest, rest.pop("config", None)), **own)

    def run(self) -> int:
        from trio.benchmark.quality import pruning_file
        from trio.benchmark.quality.calibrate import Plan, check_file, dump, resolved, table
        from trio.benchmark.quality.calibrate import calibrate as search

        plan = Plan.of(resolved(self.job), self.rows)
        file = check_file(self.output)
        defaults = file.name == pruning_file.FILE
        if defaults:
            pruning_file.check(file, plan.pruning)
        print(plan, flush=True)
        if self.dry_run:
            return 0
        report = search(plan, tell)
        print(table(report))
        text = pruning_file.merged(file, report, plan.pruning) if defaults else dump(report)
        file.write_text(text, encoding="utf-8")
        print(f"written: {file}")
        return 0
