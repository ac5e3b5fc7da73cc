"""Every speed target of this project, measured on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trio.tables import aligned

Figures = Mapping[str, Any]
"""What `trio.benchmark.speed.engine_speed.compare` returns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """goal: the figure is to reach it, or to stay below it where `at_most`."""

    name: str
    figure: Callable[[Figures], float]
    goal: float
    at_most: bool = False

    def row(self, run: str, figures: Figures) -> dict[str, Any]:
        value = self.figure(figures)
        met = value <= self.goal if self.at_most else value >= self.goal
        return {"run": run, "figure": self.name, "value": value, "goal": self._goal(), "met": met}

    def _goal(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.goal:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRun:
    """One comparison, at retention 1/9, and what is read off it."""

    shape: str
    batch: int
    output_tokens: tuple[int, int]
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        low, high = self.output_tokens
        answers = f"{low}" if low == high else f"{low} to {high}"
        return f"{self.shape}, batch {self.batch}, {answers} output tokens"


def _key(name: str, goal: float, *, at_most: bool = False) -> Target:
    return Target(name=name, figure=lambda found: found[name], goal=goal, at_most=at_most)


def _of_row(row: str, name: str, goal: float) -> Target:
    def figure(found: Figures) -> float:
        (own,) = (one for one in found["rows"] if one["name"] == row)
        return own[name]

    return Target(name=f"{name}, {row}", figure=figure, goal=goal)


_ENGINE = (
    _key("engine_vs_generate", 2.0),
    _of_row("engine", "prefill_utilisation", 0.55),
    _of_row("engine trio", "decode_utilisation", 0.60),
)
RUNS: dict[str, tuple[TargetRun, ...]] = {
    "cpu": (
        TargetRun(
            shape="small",
            batch=16,
            output_tokens=(32, 32),
            targets=(
                Target(
                    name="prefill_speedup / flops_ratio_total",
                    figure=lambda found: found["prefill_speedup"] / found["flops_ratio_total"],
                    goal=0.8,
                ),
                _key("prune_share", 0.10, at_most=True),
                _key("engine_vs_generate", 1.0),
                _key("pruned_vs_generate", 3.0),
            ),
        ),
        TargetRun(
            shape="small",
            batch=16,
            output_tokens=(8, 128),
            targets=(_key("engine_vs_generate", 1.5),),
        ),
    ),
    "cuda": (
        TargetRun(
            shape="llava-next-7b",
            batch=128,
            output_tokens=(64, 64),
            targets=(
                _key("prefill_speedup", 4.5),
                _key("throughput_speedup", 4.0),
                *_ENGINE,
            ),
        ),
        TargetRun(
            shape="llava-1.5-7b",
            batch=128,
            output_tokens=(64, 64),
            targets=(_key("prefill_speedup", 3.5), *_ENGINE),
        ),
    ),
}


def parity_row(figure: Figures) -> dict[str, Any]:
    """Of what `trio.benchmark.speed.device.parity` found in float32: the least of its counts."""
    requests = figure["requests"]
    counts = {k: v for k, v in figure.items() if "_as_" in k or k.startswith("as_")}
    name = min(counts, key=counts.__getitem__)
    met = counts[name] == requests
    return {
        "run": "parity, float32",
        "figure": name,
        "value": counts[name],
        "goal": f"all {requests}",
        "met": met,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Target beside what was reached, as aligned text."""
    lines = [["run", "figure", "reached", "target", ""]]
    for row in rows:
        verdict = "" if row["met"] else "missed"
        lines.append([row["run"], row["figure"], f"{row['value']:.3f}", row["goal"], verdict])
    return aligned(lines)
