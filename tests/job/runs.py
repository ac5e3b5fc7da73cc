"""Runs over a real Ray, with a stand-in for the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.job.fakes import fake_engine
from trio.job import runner
from trio.job.engines.engine_settings import EngineFactory, PreprocessorFactory
from trio.job.nodes import cluster
from trio.job.passes import Stop
from trio.job.plan import plan
from trio.job.settings import made_of


def execute(
    shards: Path | str,
    output: Path | str,
    factory: EngineFactory = fake_engine,
    *,
    preprocessor: PreprocessorFactory | None = None,
    stop: Stop | None = None,
    planned: Callable[[], object] = lambda: None,
    **changes: Any,
) -> dict[str, Any]:
    """The summary of a run in units of 8 rows, each with a file, with one engine, where `changes`
    say nothing else.

    Args:
        shards: the input.
        output: directory.
        factory: of the engines.
        preprocessor: what makes one; None: engines take decoded images.
        stop: a request to stop.
        planned: called between plan and run.
        changes: settings by name.
    """
    values: dict[str, Any] = {"input": (str(shards),), "output": str(output), "retention": 0.25}
    config = made_of(**values | {"rows_per_file": 8, "file_mb": 0, "actors": 1} | changes)
    made = plan(config, config.input.input)
    planned()
    makers = runner.Makers(engine=factory, preprocessor=preprocessor)
    return runner.execute(made, cluster.fit(config, attached=True), makers=makers, stop=stop)


def rows(output: Path) -> list[dict[str, Any]]:
    """Output rows in order."""
    return list(pq.read_table(output / "rows").to_pylist())
