"""The file for ``ray up``: Ray's validator takes it, and it is as trio/job/CLUSTER.md says."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from trio.job.nodes.placement import Node, place, spare_cpus

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)  # file_mounts names this directory
    loaded: Any = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    # And nothing else: the provider's defaults would install another Ray.
    ours, head = config["setup_commands"], config["head_setup_commands"]
    assert prepared["worker_setup_commands"] == ours
    assert prepared["head_setup_commands"] == [*ours, *head]


def test_head_and_workers(config: dict[str, Any]) -> None:
    kinds = config["available_node_types"]
    head, gpu, cpu = (kinds[name] for name in ("head", "gpu_worker", "cpu_worker"))
    assert len(kinds) == 3 and config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for worker in (gpu, cpu):
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["min_workers"] == 0 < worker["max_workers"]
    assert config["max_workers"] == gpu["max_workers"] + cpu["max_workers"]
    assert config["idle_timeout_minutes"] > 0
    # With all workers there, the job takes every GPU and every CPU, and nothing of the head.
    nodes = [
        Node(cpus=kind["resources"]["CPU"], gpus=kind["resources"].get("GPU", 0))
        for kind in (head, gpu, cpu)
        for _ in range(kind.get("max_workers", 1))
    ]
    out = place(nodes, actors=None, gpus_per_actor=None, cpus_per_actor=1.0)
    assert out.actors == gpu["max_workers"] * gpu["resources"]["GPU"] and not out.waiting
    assert spare_cpus(nodes, out.need, out.actors) == sum(node.cpus for node in nodes) - out.actors


def test_one_ray_everywhere(config: dict[str, Any]) -> None:
    images = [config["docker"][f"{role}_image"] for role in ("head", "worker")]
    assert images[1].endswith("-gpu")
    images.append(config["available_node_types"]["cpu_worker"]["docker"]["worker_image"])
    assert images[2] == images[0]
    versions = {image.partition(":")[2].split("-")[0] for image in images}
    (version,) = versions
    assert f'"ray[default,data]=={version}"' in config["setup_commands"][0]
    installed = ray.__version__.split(".")
    assert version.split(".")[0] == installed[0]


def test_what_belongs_to_an_account_is_marked(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        assert "REPLACE_ME" in kind["node_config"]["ImageId"]
        assert "REPLACE_ME" in kind["node_config"]["IamInstanceProfile"]["Arn"]
