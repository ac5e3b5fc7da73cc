"""What of a cluster is read and said, and which one is taken; the arithmetic has its own tests.

A real Ray is joined, or left alone, in tests/test_submitted_job.py.
"""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import ray

from trio.allocator import ONE_ARENA
from trio.errors import UserError
from trio.job.nodes import cluster
from trio.job.nodes.environment import cluster_variables
from trio.job.nodes.placement import Node
from trio.job.settings import made_of, read_address


def entry(node: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": node, "Alive": alive, "Resources": resources}


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without room, one node with four GPUs, and a dead one."""
    listed = [entry("b", CPU=16.0, GPU=4.0), entry("a"), entry("c", alive=False, CPU=64.0, GPU=8.0)]
    monkeypatch.setattr(ray, "nodes", lambda: listed)


@pytest.mark.usefixtures("three_nodes")
def test_fit() -> None:
    out = cluster.fit(made_of(), attached=True)
    assert cluster.nodes() == [Node(cpus=0.0, gpus=0.0), Node(cpus=16.0, gpus=4.0)]
    assert (out.actors, out.gpus_per_actor, out.nodes, out.per_node) == (4, 1.0, 2, 4)
    assert out.describe() == (
        "cluster of 2 nodes with 16 CPUs and 4 GPUs; 4 engines on 1 GPU; 12 tasks for images"
    )
    with pytest.raises(UserError, match="5 engines with 1 GPUs and 1 CPUs each: 4 can be placed"):
        cluster.fit(made_of(actors=5), attached=True)


@pytest.mark.usefixtures("three_nodes")
@pytest.mark.parametrize(
    ("changes", "tasks", "each"),
    [
        ({}, 12, 1.0),
        ({"cpus_per_actor": 4.0}, 4, 0.0),  # engines take all
        ({"gpus_per_actor": 0.0}, 2, 1.0),
        ({"gpus_per_actor": 0.0, "actors": 16}, 16, 0.0),
        ({"prepare_cpus": 5}, 5, 1.0),
        ({"threads": 3}, 12, 1.0),
        ({"threads": 3, "actors": 2}, 6, 1.0),
        ({"prepare_cpus": 99, "wait_for_nodes": 60}, 99, 1.0),
    ],
)
def test_tasks_for_images(changes: dict[str, Any], tasks: int, each: float) -> None:
    out = cluster.fit(made_of(**changes), attached=True)
    assert (out.prepare_tasks, out.prepare_cpus) == (tasks, each)


def test_halves_of_cpus_hold_no_task_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [entry(name, CPU=2.0) for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    config = made_of(actors=3, gpus_per_actor=0.0, cpus_per_actor=1.5)
    assert cluster.fit(config, attached=False).prepare_cpus == 0


@pytest.mark.usefixtures("three_nodes")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prepare_cpus": 13}, "--prepare-cpus: 13 CPUs for images, but the engines leave 12 of"),
        ({"threads": 4}, "--threads: 16 CPUs for images, but the engines leave 12 of"),
    ],
)
def test_more_tasks_for_images_than_engines_leave(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cluster.fit(made_of(**changes), attached=True)


@pytest.mark.usefixtures("three_nodes")
def test_nodes_still_to_come() -> None:
    config = made_of(actors=6, gpus_per_actor=1.0, wait_for_nodes=300)
    out = cluster.fit(config, attached=True)
    assert out.actors == 6 and "6 engines on 1 GPU (2 of them as nodes join)" in out.describe()


@pytest.mark.parametrize("text", ["auto", "local", "10.0.0.1:6379", "head.ray:1", "[::1]:6379"])
def test_addresses(text: str) -> None:
    assert read_address(text) == text


@pytest.mark.parametrize("text", ["here", "10.0.0.1", "ray://10.0.0.1:10001", "head:x", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match="expected"):
        read_address(text)


@pytest.fixture
def not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


@pytest.mark.usefixtures("not_submitted")
def test_an_address_at_which_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--address {address}: no Ray cluster answers there"):
            cluster.start(address)


@pytest.mark.usefixtures("not_submitted")
@pytest.mark.parametrize("alive", [True, False])
def test_a_ray_that_runs_here_is_named_and_left_alone(
    alive: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only if it lives: word of one that was killed stays behind."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster, "_start_here", lambda: None)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        if alive:
            head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert cluster.start() is False
    said = capsys.readouterr().err
    assert said.count("\n") == alive
    for part in (address, "starts one of its own", "--address auto", "RAY_ADDRESS=auto"):
        assert (part in said) is alive


def test_auto_takes_no_ray_that_is_another_jobs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="no Ray of 'ray start' runs on this machine"):
        cluster.start("auto")


@pytest.mark.parametrize(
    ("flag", "where"), [(None, "10.0.0.1:6379"), ("auto", "10.0.0.1:6379"), ("local", None)]
)
def test_a_submitted_job_stays_where_it_was_submitted(
    flag: str | None, where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    joined: list[str] = []
    monkeypatch.setattr(cluster, "_attach", lambda address, _: joined.append(address))
    if where is None:
        with pytest.raises(UserError, match="leave --address out"):
            cluster.start(flag)
    else:
        assert cluster.start(flag) is True and joined == [where]


@pytest.mark.parametrize(
    ("submitted", "expected"),
    [({}, {"GOMP_SPINCOUNT": "7"}), ({"GOMP_SPINCOUNT": "9"}, {})],
)
def test_a_submitted_jobs_own_variables_are_not_repeated(
    submitted: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses one that comes twice."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    job = {"runtime_env": {"env_vars": submitted}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert cluster_variables() == expected | ONE_ARENA
