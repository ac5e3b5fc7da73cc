"""How an actor shares a node's cores."""

from types import SimpleNamespace
from typing import Any

import pytest

from trio.pipeline import actor


@pytest.mark.parametrize(
    ("cpus", "actors", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 3, 1), (4, 1, 3), (16, 1, 15), (16, 2, 7)],
)
def test_an_engine_on_a_cpu_leaves_a_core_where_there_are_many(
    cpus: int, actors: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "usable", lambda: cpus)
    settings: Any = SimpleNamespace(actors_per_node=actors)
    assert actor.engine_threads(settings) == threads
