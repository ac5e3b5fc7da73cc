"""A checkpoint's own pruning defaults: `pruning_config.json` beside its weights.

The file says how tokens are chosen, never how many: `generation_config.json` does the same for
decoding. What somebody gives in `trio.Pruning` wins over it; what it leaves out is built in.

    {
      "proxy_positions": "with_last",
      "position_ids": "renumber",
      "schedule_shape": {"1/9": "0:0.2,5:0.12,8:0.05@16", "other": "start"},
      "about": "free text or anything else, which nobody reads"
    }

`schedule_shape` is one shape for all retentions, or one for each of some and, as `other`, for all
others (without it the model family's). It is for methods in the decoder without a reduction in the
encoder, where a schedule means something else; one that begins at layer 0 gives way to the family's
where somebody sets `proxy_layer` to `previous`. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from trio.errors import UserError, first_line
from trio.pruning.options import BuiltIn, BuiltInNumber, Pruning
from trio.pruning.schedule import ScheduleShape, check_retention

FILE = "pruning_config.json"
CHOICES = (
    "proxy_positions", "proxy_layer", "proxy_head", "position_ids", "similarity_threshold",
    "fill_up",
)  # fmt: skip
"""Fields of `Pruning` that a file may set as they are."""
SHAPE, OTHER, ABOUT = "schedule_shape", "other", "about"
KEYS = (*CHOICES, SHAPE, ABOUT)
Shape = ScheduleShape | str


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningDefaults:
    """The content of a file; empty where a checkpoint has none."""

    choices: Mapping[str, Any] = field(default_factory=dict)
    """Values of `CHOICES`."""
    shapes: Mapping[float, Shape] = field(default_factory=dict)
    """By retention."""
    other: Shape | None = None
    """The shape at all other retentions."""

    def fill(self, pruning: Pruning) -> Pruning:
        """The settings with what they leave open: from the file, else as built in.

        `position_ids` stays None where the file does not say it: that is the family's matter.
        """
        names = (*CHOICES, SHAPE)
        changes = {name: self._of(name, pruning) for name in names if _is_open(pruning, name)}
        return replace(pruning, **changes)

    def _of(self, name: str, pruning: Pruning) -> Any:
        if name != SHAPE:
            return self.choices.get(name, _plain(getattr(pruning, name)))
        if pruning.encoder != "none":
            return "family"
        shape = self.shape(pruning.retention)
        given = not _is_open(pruning, "proxy_layer")
        layer = pruning.proxy_layer if given else self.choices.get("proxy_layer")
        # The layer that has just run is asked for, and none has at layer 0.
        return "family" if layer == "previous" and _at_start(shape) else shape

    def shape(self, retention: float | None) -> Shape:
        """What a retention is spread by."""
        for known, shape in self.shapes.items():
            if retention is not None and math.isclose(known, retention, rel_tol=1e-6):
                return shape
        return self.other or "family"


def _at_start(shape: Shape) -> bool:
    return shape == "start" if isinstance(shape, str) else shape.stages[0][0] == 0


def _is_open(pruning: Pruning, name: str) -> bool:
    value = getattr(pruning, name)
    return value is None or isinstance(value, BuiltIn | BuiltInNumber)


def _plain(value: Any) -> Any:
    """What is built in, as if it had been given."""
    if isinstance(value, BuiltIn):
        return str(value)
    return float(value) if isinstance(value, BuiltInNumber) else value


def read(directory: str | Path) -> PruningDefaults:
    """Of the checkpoint in a directory; empty if it has no such file.

    Raises:
        UserError: the file cannot be read, or says what `Pruning` does not know; names the key.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return PruningDefaults()
    return read_file(path)


def read_file(path: Path) -> PruningDefaults:
    """As `read`, of a file that is there."""
    found = content(path)
    unknown = next((key for key in found if key not in KEYS), None)
    if unknown is not None:
        raise UserError(f"{path}: unknown key {unknown!r}; known are {', '.join(KEYS)}")
    choices = {name: found[name] for name in CHOICES if found.get(name) is not None}
    for name, value in choices.items():
        _checked(path, name, Pruning, **{name: value})
    given = found.get(SHAPE)
    by_retention = given if isinstance(given, dict) else {OTHER: given}
    shapes = {
        name: _checked(path, SHAPE, _shape, text)
        for name, text in by_retention.items()
        if text is not None
    }
    other = shapes.pop(OTHER, None)
    numbered = {_checked(path, SHAPE, _retention, name): one for name, one in shapes.items()}
    return PruningDefaults(choices=choices, shapes=numbered, other=other)


def content(path: Path) -> dict[str, Any]:
    """The object in a file, not yet checked.

    Raises:
        UserError: it cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _checked(path: Path, key: str, make: Any, *values: Any, **named: Any) -> Any:
    try:
        return make(*values, **named)
    except UserError as error:
        raise UserError(f"{path}: {key}: {error}") from None


def _shape(text: object) -> Shape:
    if not isinstance(text, str):
        raise UserError(f"expected text, or an object of retention and text, got {text!r:.100}")
    shape = Pruning(schedule_shape=text).schedule_shape
    assert shape is not None
    return shape


def _retention(text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{text!r} is no retention such as 1/9, nor {OTHER!r}") from None
    check_retention(value)
    return value
