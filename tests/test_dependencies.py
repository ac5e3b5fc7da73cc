"""Allowed versions are those that `.ci/run` has run: their bounds stand in two places."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(package: str) -> tuple[str, str]:
    """Lower and upper, of a line such as `ray[default]>=2.60,<2.61`."""
    pattern = rf"{package}(?:\[[\w,]+\])?>=([\d.]+),<([\d.]+)"
    lines = (re.fullmatch(pattern, line) for line in PROJECT["dependencies"])
    (found,) = filter(None, lines)
    return found[1], found[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / ".ci" / f"requirements-{name}.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def minor(version: str) -> tuple[int, int]:
    major, second = version.split(".")[:2]
    return int(major), int(second)


@pytest.mark.parametrize("package", ["torch", "transformers", "ray"])
def test_bounds_are_the_versions_that_have_been_run(package: str) -> None:
    lower, upper = bounds(package)
    lowest, newest = pins("lowest")[package], pins("newest")[package]
    assert lowest == f"{lower}.0"
    major, second = minor(newest)
    assert minor(upper) == (major, second + 1)
    assert upper.count(".") == 1


def test_both_files_pin_the_same_packages() -> None:
    assert set(pins("newest")) == {"torch", "transformers", "ray", "plotly"}
    assert set(pins("lowest")) == {*pins("newest"), "numpy"}  # which the lowest Triton wants older


def test_plotly_is_run_at_both_ends_of_its_range() -> None:
    """Its figures are checked against its own schema, which grows within a major version."""
    lower, upper = bounds("plotly")
    assert pins("lowest")["plotly"] == f"{lower}.0"
    assert minor(pins("newest")["plotly"])[0] + 1 == int(upper)
