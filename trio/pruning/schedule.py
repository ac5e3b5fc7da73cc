"""How many visual tokens stay after which layer. No tensors in here.

Stage, schedule, retention: TRIO (arXiv 2602.04657), method section and its table of settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path

import yaml

from trio.errors import UserError
from trio.values import text as as_text


@dataclass(frozen=True, slots=True)
class Stage:
    """One pruning step."""

    layer: int
    """Decoder layers that have run before it (0 prunes the embeddings)."""
    keep: int | float
    """Visual tokens kept of each image: a count (int), or a share of the tokens that the encoder
    gave for that image (float in (0, 1])."""

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise UserError(f"pruning stage: layer must be an integer >= 0, got {self.layer!r}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)):
            raise UserError(f"pruning stage at layer {self.layer}: keep must be a count or a ratio")
        if isinstance(self.keep, int) and self.keep < 1:
            raise UserError(
                f"pruning stage at layer {self.layer}: keeps {self.keep}, at least 1 must stay"
            )
        if isinstance(self.keep, float) and not 0.0 < self.keep <= 1.0:
            raise UserError(
                f"pruning stage at layer {self.layer}: ratio {self.keep} is outside (0, 1]; "
                "write counts without a decimal point"
            )

    def count(self, visual_tokens: int) -> int:
        """Tokens kept of an image with `visual_tokens`, before the cap by earlier stages."""
        if isinstance(self.keep, int):
            return self.keep
        return max(1, math.floor(self.keep * visual_tokens + 0.5))

    def __str__(self) -> str:
        return f"{self.layer}:{self.keep}"


@dataclass(frozen=True, slots=True)
class ScheduleShape:
    """A schedule known to work, to be scaled to other depths, token counts and retentions."""

    layers: int
    """Of the decoder that it is for."""
    stages: tuple[tuple[int, float], ...]
    """Layers run before each stage, and the share of visual tokens that it keeps. Only the ratios
    of the shares to each other matter."""

    def __str__(self) -> str:
        return ",".join(f"{layer}:{share!r}" for layer, share in self.stages) + f"@{self.layers}"

    @classmethod
    def parse(cls, text: str) -> ScheduleShape:
        """Read `"0:0.16,10:0.09@32"`: stages of a decoder of 32 layers.

        Raises:
            UserError: the text is something else.
        """
        found = Schedule.parse(text)
        shares = [(stage.layer, stage.keep) for stage in found.stages]
        if found.depth is None or not all(isinstance(share, float) for _, share in shares):
            raise UserError(
                f"schedule shape {text!r}: write layer:share,... and behind @ the decoder's number "
                f"of layers, as in 0:0.16,10:0.09@32, or one of {', '.join(SHAPES)}"
            )
        found.check_depth(found.depth, behind_last=True)
        return cls(found.depth, tuple((layer, float(share)) for layer, share in shares))

    def from_start(self) -> ScheduleShape:
        """The same with its first stage on the embeddings, for retentions that are out of reach
        otherwise."""
        ((_, share), *rest) = self.stages
        return ScheduleShape(self.layers, ((0, share), *rest))

    def at_depth(self, num_layers: int) -> list[tuple[int, float]]:
        """`(layer, share)` at another depth; merged where layers fall together."""
        scaled: dict[int, float] = {}
        for layer, share in self.stages:
            place = layer and max(1, math.floor(layer * num_layers / self.layers + 0.5))
            if place < num_layers:
                scaled[place] = share
        return list(scaled.items())


# The published settings without a reduction in the encoder, TRIO's table of them.
LLAVA = ScheduleShape(32, ((1, 92 / 576), (10, 54 / 576), (15, 22 / 576)))
"""LLaVA-1.5-7B; scaled, for all models without a published setting."""
LLAVA_NEXT = ScheduleShape(32, ((1, 436 / 2880), (10, 255 / 2880), (15, 173 / 2880)))
"""LLaVA-NeXT-7B, of whose largest images these are shares."""
PUBLISHED_AFTER_ENCODER = ScheduleShape(32, ((0, 96 / 576), (16, 32 / 576)))
"""With a reduction in the encoder, which is the stage at 0: the published setting of LLaVA-1.5-7B;
Qwen2.5-VL-7B's has the same shares at its own half depth."""
AFTER_ENCODER = ScheduleShape(32, ((0, 256 / 576), (4, 64 / 576), (10, 40 / 576), (16, 25 / 576)))
"""What is used instead: the encoder, which does not know the prompt, leaves the decoder more than
twice as many to choose from; measured in `benchmark/results/2026-11-23-cpu-quality.md`."""
SHAPES = ("family", "start")
"""Shapes by name: the model family's own, and that with its first stage at layer 0."""
AT_ONCE = ScheduleShape(1, ((0, 1.0),))
"""Everything before the first layer."""
_LEAST_RATIO = 1e-6


@dataclass(frozen=True, slots=True)
class Schedule:
    """Pruning stages with rising layers and falling counts; empty prunes nothing."""

    stages: tuple[Stage, ...] = ()
    depth: int | None = None
    """Decoder layers of the models that it is for; None: any that has the stages' layers."""

    def __post_init__(self) -> None:
        for before, after in pairwise(self.stages):
            if after.layer <= before.layer:
                raise UserError(f"schedule {self}: layers must rise from stage to stage")
            if type(after.keep) is not type(before.keep):
                raise UserError(f"schedule {self}: use counts or ratios, not both")
            if after.keep > before.keep:
                raise UserError(f"schedule {self}: kept tokens must not rise from stage to stage")

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) + (f"@{self.depth}" if self.depth else "")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(stage.layer for stage in self.stages)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read `"1:92,10:54,15:22"` (counts) or `"1:0.16,10:0.09"` (ratios); with `@16` behind it
        it is for decoders of 16 layers alone.

        Raises:
            UserError: the text is not a list of `layer:keep`.
        """
        stages = []
        listed, at, depth = text.partition("@")
        if at and not depth.strip().isdecimal():
            raise UserError(f"schedule {text!r}: behind @ stands the decoder's number of layers")
        for part in listed.split(","):
            layer, colon, keep = part.strip().partition(":")
            try:
                if not colon:
                    raise ValueError
                stages.append(Stage(int(layer), _number(keep.strip())))
            except UserError:
                raise
            except ValueError:
                raise UserError(
                    f"schedule {text!r}: {part.strip()!r} is not layer:keep; "
                    "write for example 1:92,10:54,15:22 or 1:0.16,10:0.09"
                ) from None
        return cls(tuple(stages), int(depth) if at else None)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read the file that `jobs/benchmark.py calibrate` has written.

        Raises:
            UserError: it cannot be read, or is no such file.
        """
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"schedule file {path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"schedule file {path}: not YAML: {reason}") from error
        text, layers = map((found if isinstance(found, dict) else {}).get, ("schedule", "layers"))
        if not isinstance(text, str) or type(layers) is not int or layers < 1:
            raise UserError(
                f"schedule file {path}: has no text 'schedule' and number 'layers', as a file that "
                "benchmark.py calibrate writes"
            )
        try:
            schedule = cls(cls.parse(text).stages, layers)
            schedule.check_depth(layers, behind_last=True)
        except UserError as error:
            raise UserError(f"schedule file {path}: {error}") from error
        return schedule

    @classmethod
    def of_shares(
        cls, retention: float, num_layers: int, stages: Sequence[tuple[int, float]]
    ) -> Schedule:
        """Ratios, so that it scales with the image, whose layer average is `retention`.

        Args:
            retention: target layer-average share of visual tokens, in (0, 1).
            num_layers: decoder layers.
            stages: layers run before each, rising, and its share, falling; only the shares' ratios
                to each other matter.

        Raises:
            UserError: the layers before the first stage already use up the target.
        """
        layers, shares = zip(*stages, strict=True)
        target = retention * num_layers - layers[0]
        if target <= 0:
            raise UserError(
                f"retention {retention:.4g} is out of reach with a first stage after {layers[0]} "
                f"of {num_layers} decoder layers"
            )
        spans = [stop - start for start, stop in pairwise([*layers, num_layers])]
        factor = _solve_scale(shares, spans, target)
        kept = [min(1.0, max(_LEAST_RATIO, round(factor * share, 6))) for share in shares]
        return cls(tuple(map(Stage, layers, kept)), num_layers)

    @classmethod
    def for_retention(
        cls,
        retention: float,
        num_layers: int,
        visual_tokens: int,
        shape: ScheduleShape = LLAVA,
    ) -> Schedule:
        """A shape, scaled to this depth and token count.

        Args:
            retention: target layer-average share of visual tokens, in (0, 1].
            num_layers: decoder layers.
            visual_tokens: tokens that the encoder gave for one image.
            shape: how the tokens are spread over the layers.

        Returns:
            Counts whose layer average is `retention * visual_tokens` to within one token.

        Raises:
            UserError: the layers before the first stage already use up more than the target; the
                message names the smallest retention in reach.
        """
        check_retention(retention)
        if retention == 1.0 or visual_tokens == 0:
            return cls()
        scaled = shape.at_depth(num_layers)
        first = scaled[0][0] if scaled else num_layers
        target = retention * visual_tokens * num_layers  # summed over layers
        least = first * visual_tokens + (num_layers - first)
        if target < least - num_layers:
            smallest = least / (num_layers * visual_tokens)
            raise UserError(
                f"retention {retention:.4g} is out of reach: with {num_layers} decoder layers the "
                f"first stage comes after {first}, and the smallest retention is {smallest:.4g} "
                f"for {visual_tokens} visual tokens; raise it, or give a schedule that starts at "
                "layer 0"
            )
        if not scaled:
            return cls()
        layers, shares = zip(*scaled, strict=True)
        spans = [stop - start for start, stop in pairwise([*layers, num_layers])]
        factor = _solve_scale(shares, spans, retention * num_layers - first)
        ideal = [min(1.0, factor * share) * visual_tokens for share in shares]
        counts = _round_counts(ideal, spans, visual_tokens)
        total = first * visual_tokens + sum(map(mul, counts, spans))
        assert abs(total - target) <= num_layers * (1 + 1e-9)
        return cls(tuple(map(Stage, layers, counts)))

    def counts(self, visual_tokens: int) -> list[tuple[int, int]]:
        """`(layer, kept)` for an image of `visual_tokens`; a stage can remove nothing."""
        left = visual_tokens
        result = []
        for stage in self.stages:
            left = min(left, stage.count(visual_tokens))
            result.append((stage.layer, left))
        return result

    def check_depth(self, num_layers: int, *, behind_last: bool = False) -> None:
        """Raise UserError unless every stage comes before the last layer, or right behind it where
        `behind_last` allows that."""
        if self.depth not in (None, num_layers):
            raise UserError(
                f"schedule {self} is for decoders of {self.depth} layers, and this model has "
                f"{num_layers}; calibrate one for it, or give --retention"
            )
        last = num_layers if behind_last else num_layers - 1
        for stage in self.stages:
            if stage.layer > last:
                raise UserError(
                    f"schedule {self}: stage at layer {stage.layer}, but the decoder has "
                    f"{num_layers} layers; the last possible stage is at {last}"
                )


SCHEDULE_FILES = (".yaml", ".yml")


def read_schedule(value: object) -> Schedule:
    """Of text such as `1:92,10:54`, or of the name of a file that `calibrate` has written."""
    text = as_text(value)
    return Schedule.load(text) if text.endswith(SCHEDULE_FILES) else Schedule.parse(text)


def read_shape(value: object) -> ScheduleShape | str:
    """Of text: a name of `SHAPES`, or as of `ScheduleShape.parse`."""
    text = as_text(value)
    return text if text in SHAPES else ScheduleShape.parse(text)


def shape_of(given: ScheduleShape | str | None, usual: ScheduleShape) -> ScheduleShape:
    """The shape that is meant.

    Args:
        given: a shape, one of `SHAPES`, or None for the family's.
        usual: the family's.
    """
    if isinstance(given, ScheduleShape):
        return given
    return usual.from_start() if given == "start" else usual


def check_retention(retention: object) -> None:
    """Raise UserError unless `retention` is in (0, 1]."""
    if not isinstance(retention, (int, float)) or not 0.0 < retention <= 1.0:
        raise UserError(f"retention must be in (0, 1], got {retention!r}; 1 switches pruning off")


def tokens_per_layer(
    visual_tokens: int, stages: Iterable[tuple[int, int]], num_layers: int
) -> list[int]:
    """Visual tokens present in each layer, for `(layer, kept)` stages in rising order."""
    present = [visual_tokens] * num_layers
    for layer, keep in stages:
        present[layer:] = [keep] * (num_layers - layer)
    return present


def _number(text: str) -> int | float:
    return float(text) if any(mark in text for mark in ".e") else int(text)


def _solve_scale(shares: Sequence[float], spans: Sequence[int], target: float) -> float:
    """The factor f with sum(span * min(1, f * share)) == target; shares fall, so 1 is reached
    stage by stage and each piece is linear."""
    total = float(target)
    for full in range(len(shares)):
        weight = sum(share * span for share, span in zip(shares[full:], spans[full:], strict=True))
        factor = max(0.0, total) / weight
        if factor * shares[full] <= 1.0:
            return factor
        total -= spans[full]
    return 1.0 / shares[-1]


def _round_counts(ideal: Sequence[float], spans: Sequence[int], visual_tokens: int) -> list[int]:
    """Whole counts near `ideal`; each makes up for what rounding cost the layers before it."""
    counts: list[int] = []
    owed = 0.0
    ceiling = visual_tokens
    for value, span in zip(ideal, spans, strict=True):
        count = min(ceiling, max(1, math.floor(value + owed / span + 0.5)))
        owed += (value - count) * span
        ceiling = count
        counts.append(count)
    return counts
