"""How an actor shares a node's cores, and makes its engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.tiny.qwen2_5_vl import save_tiny_qwen
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request
from trio.job import actor
from trio.job.cluster import Resources
from trio.job.runner import engine_settings
from trio.job.settings import made_of


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


def test_limits_on_the_size_of_images_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    model = str(save_tiny_qwen(tmp_path))
    config = made_of(model=model, min_pixels=20 * 64, max_pixels=30 * 64, retention=1.0)
    resources = Resources(
        cpus=1, gpus=0, nodes=1, actors=1, gpus_per_actor=0, cpus_per_actor=1, attached=False
    )
    engine = actor.build_engine(engine_settings(config, resources))
    assert isinstance(engine, Engine)
    for size, tokens in (((16, 16), 25), ((240, 200), 30)):
        made = engine.prepare(Request(prompt="what", images=(Image.new("RGB", size),)))
        assert isinstance(made, Prepared) and made.image_tokens == (tokens,)


def test_intervals_tell_what_is_new_and_what_is_so() -> None:
    counters: dict[str, Any] = {"out_of_memory": 2, "batch_tokens": 50, "cuda_graphs": "on"}
    report = actor._Report(lambda: dict(counters))
    limits, spent = report.interval()
    assert (spent.out_of_memory, spent.cuda_graphs, limits["batch_tokens"]) == (2, {"on": 1}, 50)
    counters |= {"out_of_memory": 3, "batch_tokens": 25, "cuda_graphs": "off: why"}
    limits, spent = report.interval()
    assert (spent.out_of_memory, spent.cuda_graphs) == (1, {"off: why": 1})
    assert (limits["batch_tokens"], limits["max_running"]) == (25, None)
