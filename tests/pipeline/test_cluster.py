"""What of a cluster is read and said; the arithmetic has its own tests."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from trio.errors import UserError
from trio.pipeline import cluster
from trio.pipeline.config import JobConfig
from trio.pipeline.placement import Node


def entry(node: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": node, "Alive": alive, "Resources": resources}


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without room, one node with four GPUs of which one is taken, and a dead one."""
    listed = [entry("b", CPU=16.0, GPU=4.0), entry("a"), entry("c", alive=False, CPU=64.0, GPU=8.0)]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 15.0, "GPU": 3.0})
    monkeypatch.setattr(cluster, "autoscales", lambda: False)


@pytest.mark.usefixtures("three_nodes")
def test_fit() -> None:
    out = cluster.fit(JobConfig(), attached=True)
    assert cluster.nodes() == [Node(cpus=0.0, gpus=0.0), Node(cpus=16.0, gpus=4.0)]
    assert (out.actors, out.gpus_per_actor, out.nodes, out.per_node) == (4, 1.0, 2, 4)
    assert out.describe() == (
        "cluster of 2 nodes with 16 CPUs and 4 GPUs; 4 engines on 1 GPU;"
        " 1 CPUs and 1 GPUs of it are in use by others now"
    )
    with pytest.raises(UserError, match="5 engines with 1 GPUs and 1 CPUs each: 4 can be placed"):
        cluster.fit(JobConfig(actors=5), attached=True)


@pytest.mark.usefixtures("three_nodes")
def test_nodes_still_to_come() -> None:
    config = JobConfig(actors=6, gpus_per_actor=1.0, wait_for_nodes=300)
    out = cluster.fit(config, attached=True)
    assert out.actors == 6
    assert "4 of them fit now" in out.note and "adds no nodes by itself" in out.note


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"5d03": "node_5d03"}, False),
        ({"ffff": "ray.head.default"}, True),
        ({"ffff": "head", "0001": "gpu_worker"}, True),
        ({}, None),
        (None, None),
    ],
)
def test_whether_it_autoscales(
    monkeypatch: pytest.MonkeyPatch, types: dict[str, str] | None, expected: bool | None
) -> None:
    report = {"autoscaler_report": {"node_type_mapping": types}}
    value = b"" if types is None else json.dumps(report).encode()
    client = SimpleNamespace(internal_kv_get=lambda key, namespace: value)
    monkeypatch.setattr(ray._private.worker.global_worker, "gcs_client", client, raising=False)
    assert cluster.autoscales() is expected
