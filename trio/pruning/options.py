"""Settings of the pruning. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from trio.errors import UserError
from trio.pruning import method_registry
from trio.pruning.schedule import (
    AFTER_ENCODER,
    AT_ONCE,
    LLAVA,
    SHAPES,
    Schedule,
    ScheduleShape,
    check_retention,
    read_schedule,
    read_shape,
    shape_of,
)
from trio.values import Fraction, Value, number, one_of

ENCODERS = ("none", "visionzip", "scan", "scope", "prunesid")
PROXY_POSITIONS = ("reference", "with_last", "last")
POSITION_IDS = ("renumber", "keep")
PROXY_LAYERS = ("next", "previous")
PROXY_HEADS = ("output", "input_embedding")
FILL_UPS = ("mixed", "reference")


def read_method(value: object) -> str:
    """Of text: the name of a method, or module:Class."""
    method_registry.check_name(value)
    return str(value)


def _method_names() -> str:
    return "{" + ",".join(method_registry.method_names()) + "}"


def read_options(value: object) -> str | None:
    """Settings of a method's own, from a mapping or text, as text; None where there are none."""
    if isinstance(value, Mapping):
        value = ",".join(f"{name}={own}" for name, own in value.items())
    if not isinstance(value, str) or not all("=" in own for own in value.split(",") if value):
        raise UserError(f"method_options must be like beta=2.0,alpha=0.5, got {value!r}")
    return value or None


Stages = Annotated[Schedule | str, Value(read=read_schedule, unit="LAYER:KEEP,...")]
Spread = Annotated[ScheduleShape | str, Value(read=read_shape, unit="SHAPE")]
COSINE = Value(read=number(above=-1, most=1), unit="COSINE")
MethodOptions = Annotated[str | Mapping[str, Any], Value(read=read_options, unit="NAME=VALUE,...")]
Method = Annotated[str, Value(read=read_method, unit=_method_names)]


class BuiltIn(str):
    """A setting of `Pruning` that nobody gave, so that a checkpoint may say another one."""

    __slots__ = ()


class BuiltInNumber(float):
    """As `BuiltIn`."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """What to prune, how much and how.

    What is not given is what the checkpoint's `pruning_config.json` says, else what is built in.
    """

    retention: Fraction | None = None
    """Share of the visual tokens kept, averaged over the layers; 1 switches pruning off, 1/9 may be
    written as such. Exclusive with `schedule`; with neither, nothing is pruned by `trio.Pruning`,
    and jobs take 1/9."""
    schedule: Stages | None = None
    """Stages instead of a retention: layer:tokens kept of an image (1:92,10:54,15:22) or
    layer:share of its visual tokens (1:0.16,10:0.09); @32 behind them makes them for decoders of 32
    layers alone. Jobs also take a .yaml file that `benchmark.py calibrate` wrote, and note its
    stages; Python takes `Schedule.load(path)`."""
    method: Method = "trio"
    """How tokens are chosen: trio (gradient saliency, then NMS), another of `trio.method_names()`,
    which pruning/README.md explains, or module:Class for one of your own; none leaves the choice to
    the encoder's reduction."""
    proxy_positions: Annotated[str, one_of(PROXY_POSITIONS)] = BuiltIn("reference")
    """Positions whose loss gives the saliency, of a sequence of n tokens: reference n-5..n-2,
    with_last n-4..n-1, last n-1 (default: the checkpoint's, else reference)."""
    proxy_layer: Annotated[str, one_of(PROXY_LAYERS)] = BuiltIn("next")
    """Layer whose loss gives the saliency: next (the one that would run next) or previous (the one
    that has just run, as in the published code for Qwen2.5-VL; rules out a stage at layer 0 and
    allows one behind the last layer) (default: the checkpoint's, else next)."""
    proxy_head: Annotated[str, one_of(PROXY_HEADS)] = BuiltIn("output")
    """What makes the logits of that loss: output (the model's head) or input_embedding (the matrix
    of token embeddings, as in the published code for Qwen2.5-VL) (default: the checkpoint's, else
    output)."""
    position_ids: Annotated[str | None, one_of(POSITION_IDS)] = None
    """Positions of the tokens that stay: renumber (0, 1, 2, ... on every axis after each stage,
    that in the encoder included) or keep (default: the checkpoint's, else the model family's)."""
    similarity_threshold: Annotated[float, COSINE] = BuiltInNumber(0.8)
    """Cosine from which the NMS of method trio calls two tokens the same (default: the
    checkpoint's, else 0.8)."""
    fill_up: Annotated[str, one_of(FILL_UPS)] = BuiltIn("mixed")
    """What method trio adds where the NMS leaves fewer tokens than are to be kept: mixed (a quarter
    by saliency, the others by farthest-point sampling over features and places in the image) or
    reference (all by saliency, as published) (default: the checkpoint's, else mixed)."""
    seed: int = 0
    """Seed of method random."""
    schedule_shape: Spread | None = None
    """How a retention is spread over the layers: family (the model family's: the paper's, scaled),
    start (the same with its first stage at layer 0) or layer:share,...@layers, as in
    0:0.2,5:0.12@16, where only the ratios of the shares matter (default: the checkpoint's, else
    family)."""
    encoder: Annotated[str, one_of(ENCODERS)] = "none"
    """What reduces visual tokens in the vision encoder already. Of a retention it takes what
    `schedule_shape` has at layer 0, four times the layer average unless told otherwise, and the
    decoder's stages do the rest; with method none it does all. A schedule says with a stage at
    layer 0 how many it keeps."""
    method_options: MethodOptions | None = None
    """Settings of the method's own, as beta=2.0,alpha=0.5, in Python also `{"beta": 2.0}`; the
    method's class in pruning/methods/ has them with their meaning."""

    def __post_init__(self) -> None:
        if self.retention is not None and self.schedule is not None:
            raise UserError("retention and schedule exclude each other: give one of them, not both")
        if self.retention is not None:
            check_retention(self.retention)
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        elif self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise UserError(
                f"schedule must be a trio.Schedule or text like 1:92,10:54, got {self.schedule!r}"
            )
        if isinstance(self.schedule_shape, str) and self.schedule_shape not in SHAPES:
            shape = ScheduleShape.parse(self.schedule_shape)
            object.__setattr__(self, "schedule_shape", shape)
        elif not isinstance(self.schedule_shape, ScheduleShape | str | None):
            raise UserError(
                f"schedule_shape must be a ScheduleShape, text or None, "
                f"got {self.schedule_shape!r:.100}"
            )
        method_registry.check_name(self.method)
        if self.method_options is not None:
            object.__setattr__(self, "method_options", read_options(self.method_options))
        _one_of("encoder", self.encoder, ENCODERS)
        _one_of("proxy_positions", self.proxy_positions, PROXY_POSITIONS)
        _one_of("proxy_layer", self.proxy_layer, PROXY_LAYERS)
        _one_of("proxy_head", self.proxy_head, PROXY_HEADS)
        _one_of("fill_up", self.fill_up, FILL_UPS)
        if self.position_ids is not None:
            _one_of("position_ids", self.position_ids, POSITION_IDS)
        threshold = self.similarity_threshold
        is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not (is_number and -1.0 < threshold <= 1.0):
            raise UserError(f"similarity_threshold must be in (-1, 1], got {threshold!r}")
        if isinstance(self.schedule, Schedule):
            self._check_layers(self.schedule)

    def _check_layers(self, schedule: Schedule) -> None:
        """What a schedule's layers may be, given the other settings."""
        layers = schedule.layers
        if not layers:
            return
        if self.encoder != "none" and layers[0] != 0:
            raise UserError(
                f"schedule {schedule}: with encoder {self.encoder} it must say what the encoder "
                "keeps, as a stage at layer 0, for example 0:96,16:32"
            )
        if self._at_once and layers != (0,):
            raise UserError(
                f"schedule {schedule}: {self._at_once} chooses before the decoder; give one stage "
                "at layer 0, for example 0:64"
            )
        first = layers[1:] if self.encoder != "none" else layers
        if self.proxy_layer == "previous" and 0 in first and not self._at_once:
            raise UserError(
                f"schedule {schedule}: proxy_layer previous takes the layer that has just run, and "
                "none has at layer 0; begin at layer 1, or set proxy_layer to next (with a "
                "retention: or schedule_shape to family)"
            )

    @property
    def _at_once(self) -> str | None:
        """What chooses all tokens before the decoder's first layer, if something does."""
        if self._before_decoder:
            return f"method {self.method}"
        if self.method == "none" and self.encoder != "none":
            return f"encoder {self.encoder} without a method"
        return None

    @property
    def name(self) -> str:
        """What chooses: the method, behind the encoder's reduction if there is one."""
        if self.encoder == "none":
            return self.method
        return self.encoder if self.method == "none" else f"{self.encoder} + {self.method}"

    @property
    def active(self) -> bool:
        """False when no prompt can lose a token under these settings."""
        if self.method == "none" and self.encoder == "none":
            return False
        if isinstance(self.schedule, Schedule):
            return bool(self.schedule.stages)
        return self.retention is not None and self.retention < 1.0

    @property
    def chooses(self) -> bool:
        """Whether a method takes part, in the decoder or before it."""
        return self.active and self.method != "none"

    @property
    def _before_decoder(self) -> bool:
        return method_registry.chooses_before_decoder(self.method)

    def stages(self, visual_tokens: int, num_layers: int) -> list[tuple[int, int]]:
        """`(layer, kept)` for one image, of the stages in the decoder.

        Args:
            visual_tokens: tokens that the encoder gave for this image, before any reduction.
            num_layers: layers of the decoder.

        Raises:
            UserError: the retention is out of reach, or a stage has no layer for its proxy.
        """
        counts = self._counts(visual_tokens, num_layers)
        if self.encoder == "none" or self._before_decoder:
            return counts
        return counts[1:]

    def encoded(self, visual_tokens: int, num_layers: int) -> int:
        """Visual tokens of one image that enter the decoder; arguments as of `stages`."""
        if self.encoder == "none" or not (counts := self._counts(visual_tokens, num_layers)):
            return visual_tokens
        ((_, keep), *_) = counts
        if self._before_decoder:
            keep = self._behind(visual_tokens, num_layers, keep)
        return keep

    def _behind(self, visual_tokens: int, num_layers: int, keep: int) -> int:
        """What a method before the decoder chooses so many from: as many as others are given."""
        retention = min(1.0, keep / visual_tokens)
        others = Schedule.for_retention(retention, num_layers, visual_tokens, AFTER_ENCODER)
        stages = others.stages
        return stages[0].count(visual_tokens) if stages else visual_tokens

    def _counts(self, visual_tokens: int, num_layers: int) -> list[tuple[int, int]]:
        """All stages, in the encoder (layer 0) and in the decoder."""
        if not self.active or visual_tokens == 0:
            return []
        schedule = self.schedule
        if not isinstance(schedule, Schedule):
            assert self.retention is not None
            usual = LLAVA if self.encoder == "none" else AFTER_ENCODER
            shape = AT_ONCE if self._at_once else shape_of(self.schedule_shape, usual)
            schedule = Schedule.for_retention(self.retention, num_layers, visual_tokens, shape)
            self._check_layers(schedule)
        schedule.check_depth(num_layers, behind_last=self.proxy_layer == "previous")
        return schedule.counts(visual_tokens)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
