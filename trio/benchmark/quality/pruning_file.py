"""What `calibrate` writes as `pruning_config.json`, beside what such a file holds already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from trio.errors import UserError
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import ABOUT, CHOICES, FILE, OTHER, SHAPE, content, read_file
from trio.pruning.schedule import Schedule


def check(path: Path, pruning: Pruning) -> None:
    """Raise UserError unless a shape found with these settings may stand in this file.

    Args:
        path: of the file, which may be there.
        pruning: settled.
    """
    if pruning.method != "trio" or pruning.encoder != "none":
        raise UserError(
            f"--output {path}: {FILE} is for method trio without an encoder, and this is "
            f"{pruning.name}; write a .yaml file for --schedule instead"
        )
    if not path.exists():
        return
    choices = read_file(path).choices
    for name in CHOICES:
        there, here = choices.get(name, getattr(Pruning(), name)), getattr(pruning, name)
        if there is not None and there != here:
            raise UserError(
                f"--output {path}: it says {name} {there}, and the search is for {here}; name "
                "another file, or search with the file's settings"
            )


def merged(path: Path, report: Mapping[str, Any], pruning: Pruning) -> str:
    """The file's text with the shape for the report's retention added or replaced."""
    before = content(path) if path.exists() else {}
    shapes = before.get(SHAPE) or {}
    if isinstance(shapes, str):
        shapes = {OTHER: shapes}
    about = before.get(ABOUT) if isinstance(before.get(ABOUT), dict) else {}
    name = _name(report["retention"])
    stages = replace(Schedule.parse(report["schedule"]), depth=report["layers"])
    found = {
        **{choice: getattr(pruning, choice) for choice in CHOICES},
        SHAPE: {name: str(stages), **{key: own for key, own in shapes.items() if key != name}},
        ABOUT: {**(about or {}), f"calibrated at {name}": dict(report)},
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _name(retention: float) -> str:
    """A retention as people write it."""
    near = Fraction(retention).limit_denominator(99)
    return str(near) if abs(float(near) - retention) < 1e-6 * retention else repr(retention)
