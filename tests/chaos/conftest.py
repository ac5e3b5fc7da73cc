"""A real Ray of several nodes for each module, away from any other Ray on the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.chaos.harness")

from tests.chaos.harness import MARK, ROOT, Trial, write_input  # noqa: E402
from tests.job.store import CREDENTIALS, Store, bucket_of, serving  # noqa: E402
from trio.job.nodes.environment import FEW_CPUS  # noqa: E402

NODES, NODE_CPUS = 3, 2
NOTICED_S = 60
# longest that Ray takes to notice that a node has died


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables for this process and those it starts, and no other of Ray's."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("RAY_"):
            del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Arena:
    """A cluster whose nodes come and go."""

    cluster: Any
    nodes: dict[str, Any] = field(default_factory=dict)
    # ray._private.node.Node of each worker node, by id
    size: int = NODES
    # worker nodes at the start of a test

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **resources: int) -> str:
        """One more node, with NODE_CPUS if not said otherwise; its id."""
        node = self.cluster.add_node(**{"num_cpus": NODE_CPUS, **resources})
        self.nodes[node.node_id] = node
        return str(node.node_id)

    def kill(self, node: str) -> None:
        """End a node's raylet and workers as a power cut would."""
        self.cluster.remove_node(self.nodes.pop(node), allow_graceful=False)

    def empty(self) -> None:
        """All nodes but the head die, and are known to be dead."""
        for node in list(self.nodes):
            self.kill(node)
        self.cluster.wait_for_nodes(NOTICED_S)

    def refill(self) -> None:
        """As many nodes as at the start, and no dead one that Ray still believes in."""
        self.cluster.wait_for_nodes(NOTICED_S)
        while len(self.nodes) < self.size:
            self.add()


@contextmanager
def started(*, nodes: int = NODES, **variables: str) -> Iterator[Arena]:
    from ray.cluster_utils import Cluster

    room = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")  # sockets want a short path
    values = {
        MARK: uuid.uuid4().hex,
        "RAY_TMPDIR": room,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **FEW_CPUS,
        "SPT_NOENV": "1",  # Ray's workers rename themselves; their environment stays readable
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "jobs")]),
        **CREDENTIALS,
        **variables,
    }
    with environment(**values):
        cluster = Cluster()
        try:
            # No CPU on the head: engines are on nodes that can be killed.
            cluster.add_node(num_cpus=0, include_dashboard=False)
            arena = Arena(cluster, size=nodes)
            arena.refill()
            yield arena
        finally:
            cluster.shutdown()
            shutil.rmtree(room, ignore_errors=True)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with started() as out:
        yield out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    with serving(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def store(server: tuple[int, Path]) -> Store:
    return bucket_of(server)


@pytest.fixture
def trial(arena: Arena, tmp_path: Path) -> Callable[..., Trial]:
    return trials(arena, tmp_path)


def trials(arena: Arena, tmp_path: Path) -> Callable[..., Trial]:
    """What makes a job's input and what watches it; ``begins`` as in ``write_input``."""

    def make(
        *flags: str, output: str | None = None, refill: bool = True, **begins: str | int
    ) -> Trial:
        if refill:
            arena.refill()
        expected = write_input(tmp_path / "in", begins)
        return Trial(
            address=arena.address,
            folder=tmp_path,
            expected=expected,
            output=output or str(tmp_path / "out"),
            flags=flags,
        )

    return make
