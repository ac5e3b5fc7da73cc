"""How engines share a node's cores and are made, and the preprocessor without one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.tiny.qwen2_5_vl import save_tiny_qwen
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request
from trio.job.engines import engine_settings as made
from trio.job.engines.engine_actor import _Report
from trio.job.nodes.cluster import Resources
from trio.job.output.totals import Totals
from trio.job.runner import engine_settings
from trio.job.settings import made_of


@pytest.mark.parametrize(
    ("cpus", "actors", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 3, 1), (4, 1, 3), (16, 1, 15), (16, 2, 7)],
)
def test_an_engine_on_a_cpu_leaves_a_core_where_there_are_many(
    cpus: int, actors: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "usable", lambda: cpus)
    settings: Any = SimpleNamespace(engines_per_node=actors)
    assert made.engine_threads(settings) == threads


def test_limits_on_the_size_of_images_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    model = str(save_tiny_qwen(tmp_path))
    config = made_of(model=model, min_pixels=20 * 64, max_pixels=30 * 64, retention=1.0)
    resources = Resources(
        cpus=1, gpus=0, nodes=1, actors=1, gpus_per_actor=0, cpus_per_actor=1, attached=False
    )
    settings = engine_settings(config, resources)
    (engine,), preprocessor = made.build_engines(settings), made.build_preprocessor(settings)
    assert isinstance(engine, Engine) and preprocessor is made.build_preprocessor(settings)
    for size, tokens in (((16, 16), 25), ((240, 200), 30)):
        image = Image.new("RGB", size)
        for images in ((image,), tuple(preprocessor.process([image]))):
            found = engine.prepare(Request(prompt="what", images=images))
            assert isinstance(found, Prepared) and found.image_tokens == (tokens,)


def test_intervals_tell_what_is_new_and_what_is_so() -> None:
    counters: dict[str, Any] = {"out_of_memory": 2, "batch_tokens": 50, "cuda_graphs": "on"}
    counters |= {"decode_rows": 6, "decode_steps": 2, "idle_s": 1.5}
    report = _Report(lambda: dict(counters))
    stats, spent = report.interval(Totals(rows=7))
    assert (spent.rows, spent.out_of_memory, spent.cuda_graphs) == (7, 2, {"on": 1})
    assert (stats["batch_tokens"], stats["running_mean"], spent.idle_s) == (50, 3.0, 1.5)
    counters |= {"out_of_memory": 3, "batch_tokens": 25, "cuda_graphs": "off: why"}
    later, spent = report.interval(Totals())
    assert (spent.rows, spent.out_of_memory, spent.cuda_graphs) == (0, 1, {"off: why": 1})
    assert (later["batch_tokens"], later["max_running"], later["running_mean"]) == (25, None, None)
    assert spent.idle_s == 0 and later["start"] == stats["end"] <= later["end"]
