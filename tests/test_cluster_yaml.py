"""The file for ``ray up``: Ray's validator takes it, and it is as trio/job/CLUSTER.md says."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from trio.job.placement import Node, place

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
    head = config["available_node_types"][config["head_node_type"]]
    (worker,) = (v for k, v in config["available_node_types"].items() if k != "head")
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["min_workers"] == 0 and worker["max_workers"] == config["max_workers"] > 0
    assert config["idle_timeout_minutes"] > 0
    # With all workers there, the job takes every GPU and nothing of the head.
    node = Node(cpus=worker["resources"]["CPU"], gpus=worker["resources"]["GPU"])
    nodes = [Node(cpus=head["resources"]["CPU"], gpus=0), *[node] * worker["max_workers"]]
    out = place(nodes, actors=None, gpus_per_actor=None, cpus_per_actor=1.0)
    assert out.actors == worker["max_workers"] * worker["resources"]["GPU"] and not out.note


def test_one_ray_everywhere(config: dict[str, Any]) -> None:
    images = [config["docker"][f"{role}_image"] for role in ("head", "worker")]
    assert images[1].endswith("-gpu")
    versions = {image.partition(":")[2].split("-")[0] for image in images}
    (version,) = versions
    assert f'"ray[default]=={version}"' in config["setup_commands"][0]
    installed = ray.__version__.split(".")
    assert version.split(".")[0] == installed[0]


def test_what_belongs_to_an_account_is_marked(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        assert "REPLACE_ME" in kind["node_config"]["ImageId"]
        assert "REPLACE_ME" in kind["node_config"]["IamInstanceProfile"]["Arn"]
