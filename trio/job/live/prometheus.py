"""Counters and gauges of a run for Prometheus, through `ray.util.metrics`.

The driver makes all of them. It counts a unit when it hears that it is committed, once, as
``summary.json`` does: so the counters of an attempt, summed over its engines, are what that attempt
adds to the summary, and a unit that is done again counts once. Ray gives them out on each node's
metrics port with `ray_` in front; `grafana.json` beside this file shows every one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util import metrics

from trio.job.desk import Gauges
from trio.job.output.progress import Progress
from trio.job.output.summary import phases
from trio.job.output.totals import Totals

RUN, ENGINE, KIND, PHASE = "run", "engine", "kind", "phase"
OF_ENGINE = (RUN, ENGINE)


@dataclass(frozen=True, slots=True)
class Sum:
    """Grows by what committed units add up to."""

    name: str
    says: str
    field: str
    """Of `Totals`."""


COUNTERS = (
    Sum("trio_rows_total", "Output rows that are committed.", "rows"),
    Sum("trio_input_rows_total", "Input rows that are committed.", "inputs"),
    Sum("trio_images_total", "Images of rows that were answered.", "images"),
    Sum("trio_images_encoded_total", "Images that the encoder read.", "images_encoded"),
    Sum("trio_prompt_tokens_total", "Tokens of prompts before pruning.", "prompt_tokens"),
    Sum("trio_visual_tokens_total", "Visual tokens before pruning.", "visual_tokens"),
    Sum("trio_output_tokens_total", "Tokens of answers.", "output_tokens"),
    Sum(
        "trio_reading_flops_total",
        "FLOPs of reading prompts, with encoder and choosing.",
        "reading_flops",
    ),
    Sum(
        "trio_reading_flops_unpruned_total",
        "FLOPs of reading the same prompts unpruned.",
        "reading_flops_unpruned",
    ),
    Sum("trio_kv_bytes_total", "Bytes of prompts and answers in the KV cache.", "kv_bytes"),
    Sum("trio_kv_bytes_unpruned_total", "The same unpruned.", "kv_bytes_unpruned"),
    Sum("trio_prepare_seconds_total", "Seconds of decoding and preprocessing images.", "prepare_s"),
    Sum("trio_out_of_memory_total", "Times that a device ran out of memory.", "out_of_memory"),
)
ERRORS = "trio_rows_error_total"
SECONDS = "trio_engine_seconds_total"
OF_RUN = {
    "trio_rows_left": "Input rows that are not committed.",
    "trio_rows_uncommitted": "Rows that are answered and not committed.",
    "trio_eta_seconds": "Estimate of the time that is left.",
    "trio_retention_ratio": "Visual tokens kept, layer average, mean over rows.",
    "trio_engines_working": "Engines that are ready.",
}
OF_ENGINES = {
    "running": ("trio_running_requests", "Requests decoded together, mean of some seconds."),
    "kv_used_bytes_peak": ("trio_kv_used_peak_bytes", "Most bytes held in the KV cache."),
    "kv_budget_bytes": ("trio_kv_budget_bytes", "Bytes set aside for the KV cache."),
}
NAMES = frozenset(
    [
        *(counter.name for counter in COUNTERS),
        ERRORS,
        SECONDS,
        *OF_RUN,
        *(name for name, _ in OF_ENGINES.values()),
    ]
)
"""Without Ray's prefix."""


def increments(totals: Totals) -> Iterator[tuple[str, dict[str, str], float]]:
    """What committed rows add: counter, tags beside those of run and engine, and by how much."""
    for counter in COUNTERS:
        yield counter.name, {}, getattr(totals, counter.field)
    for kind, rows in totals.error_kinds.items():
        yield ERRORS, {KIND: kind}, rows
    for phase, seconds in phases(totals).items():
        yield SECONDS, {PHASE: phase}, seconds


class RunMetrics:
    """A run's metrics; a context manager, after which no engine is at work any more."""

    def __init__(self, run_id: str) -> None:
        self._run = {RUN: run_id}
        own: dict[str, Any] = {
            counter.name: metrics.Counter(counter.name, counter.says, OF_ENGINE)
            for counter in COUNTERS
        }
        own[ERRORS] = metrics.Counter(ERRORS, "Rows in error.", (*OF_ENGINE, KIND))
        own[SECONDS] = metrics.Counter(SECONDS, "Time of engines by phase.", (*OF_ENGINE, PHASE))
        own |= {name: metrics.Gauge(name, says, (RUN,)) for name, says in OF_RUN.items()}
        own |= {name: metrics.Gauge(name, says, OF_ENGINE) for name, says in OF_ENGINES.values()}
        self._metrics = own
        self._engines: set[str] = set()

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._of_engines({})
        for name in ("trio_engines_working", "trio_rows_uncommitted"):
            self._metrics[name].set(0, self._run)

    def add(self, totals: Totals, engine: str) -> None:
        """A unit is committed; `engine`: who did."""
        tags = self._run | {ENGINE: short(engine)}
        for name, more, by in increments(totals):
            if by > 0:
                self._metrics[name].inc(by, tags | more)

    def look(self, progress: Progress, gauges: Gauges | None = None) -> None:
        """Set the gauges to how things are; `gauges`: of the engines, None leaves them."""
        found: dict[str, float | None] = {
            "trio_rows_left": progress.rows_left,
            "trio_eta_seconds": progress.eta_s,
            "trio_retention_ratio": progress.done.retention,
        }
        if gauges is not None:
            found["trio_rows_uncommitted"] = gauges.answered
            found["trio_engines_working"] = len(gauges.engines)
            self._of_engines(gauges.engines)
        for name, value in found.items():
            self._metrics[name].set(value, self._run)  # which leaves out a None

    def _of_engines(self, said: Mapping[str, Mapping[str, float]]) -> None:
        """Of engines that are gone nothing runs, or is held."""
        of = {short(name): figures for name, figures in said.items()}
        self._engines |= of.keys()
        for engine in self._engines:
            tags = self._run | {ENGINE: engine}
            for key, (name, _) in OF_ENGINES.items():
                value = of[engine].get(key) if engine in of else 0.0
                self._metrics[name].set(value, tags)


def short(engine: str) -> str:
    """The number that ends an engine's name, as in "captions 0123abcd pass 0 engine 3": so a run
    has as many values of this tag as engines, however many passes it takes."""
    return engine.rpartition(" ")[2]
