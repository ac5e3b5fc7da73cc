"""Which engines fit on which nodes, and what is said when they do not."""

from typing import Any

import pytest

from trio.errors import UserError
from trio.job.nodes.placement import (
    UNBOUNDED,
    Need,
    Node,
    Resources,
    describe,
    place,
    spare_cpus,
)

HEAD = Node(cpus=0, gpus=0)
ONE = Node(cpus=8, gpus=1)
FOUR = Node(cpus=16, gpus=4)


def placed(nodes: list[Node], **asked: Any) -> Resources:
    defaults = {"actors": None, "gpus_per_actor": None, "cpus_per_actor": 1.0}
    return place(nodes, **defaults | asked)


@pytest.mark.parametrize(
    ("need", "node", "expected"),
    [
        ((1, 1), ONE, 1),
        ((1, 1), FOUR, 4),
        ((3, 1), FOUR, 1),
        ((5, 1), FOUR, 0),
        ((0.5, 1), FOUR, 8),
        # A share lies on one GPU: four times two, not floor(4 / 0.4).
        ((0.4, 1), FOUR, 8),
        ((1 / 3, 1), FOUR, 12),
        ((0.1, 1), Node(cpus=12, gpus=4), 12),
        ((1, 8), FOUR, 2),
        ((0, 3), FOUR, 5),
        ((0, 1), HEAD, 0),
        ((0, 0), HEAD, UNBOUNDED),
        ((1, 0), HEAD, 0),
    ],
)
def test_engines_of_a_node(need: tuple[float, float], node: Node, expected: int) -> None:
    assert Need(gpus=need[0], cpus=need[1]).fits_on(node) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([Node(cpus=4, gpus=0)], {}, (1, 1, 1, 0)),
        ([HEAD, FOUR, ONE], {}, (5, 5, 4, 1)),
        ([HEAD, FOUR, ONE], {"gpus_per_actor": 2.0}, (2, 2, 2, 2)),
        ([HEAD, FOUR, ONE], {"actors": 2}, (2, 2, 1, 1)),
        ([FOUR], {"gpus_per_actor": 0.0, "actors": 3}, (3, 3, 3, 0)),
        ([HEAD], {"actors": 8, "gpus_per_actor": 1.0, "wait_s": 60.0}, (8, 0, 1, 1)),
        ([HEAD, ONE], {"actors": 8, "wait_s": 60.0}, (8, 1, 1, 1)),
        ([HEAD, ONE, ONE], {"wait_s": 60.0}, (2, 2, 1, 1)),
        ([HEAD], {"gpus_per_actor": 0.0, "wait_s": 60.0}, (1, 0, 1, 0)),
    ],
)
def test_placed(
    nodes: list[Node], asked: dict[str, Any], expected: tuple[int, int, int, float]
) -> None:
    out = placed(nodes, **asked)
    assert (out.actors, out.actors - out.waiting, out.per_node, out.need.gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        (
            [HEAD, ONE, ONE],
            {"gpus_per_actor": 2.0},
            r"1 engine with 2 GPUs and 1 CPUs each: none can be placed on what Ray has \(1 node"
            r" with 0 CPUs and 0 GPUs, 2 nodes with 8 CPUs and 1 GPUs each\); lower"
            r" --actors, --gpus-per-actor or --cpus-per-actor",
        ),
        ([FOUR, ONE], {"actors": 6}, r"6 engines with 1 GPUs .*: 5 can .*; lower --actors"),
        ([FOUR], {"gpus_per_actor": 3.0, "actors": 2}, "2 engines with 3 GPUs .*: 1 can"),
        ([ONE], {"actors": 50, "gpus_per_actor": 0.0}, "50 engines .*: 8 can .* 8 CPUs"),
        ([HEAD], {}, "none can be placed .* give --wait-for-nodes SECONDS"),
        ([HEAD], {"wait_s": 60.0}, "give both --actors and --gpus-per-actor"),
        ([HEAD], {"wait_s": 60.0, "actors": 4}, "give both --actors and --gpus-per-actor"),
        ([HEAD], {"wait_s": 60.0, "gpus_per_actor": 1.0}, "give both --actors and"),
        ([FOUR], {"gpus_per_actor": 1.5}, "a part of one GPU or whole GPUs"),
    ],
)
def test_refused(nodes: list[Node], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        placed(nodes, **asked)


def test_no_node() -> None:
    assert describe([]) == "no node"
    with pytest.raises(UserError, match=r"none can be placed on what Ray has \(no node\)"):
        placed([])


def test_cpus_that_engines_leave() -> None:
    """A CPU that lies in halves on two nodes is none, and engines go where the fewest are."""
    one, half = Need(cpus=1, gpus=0), Need(cpus=1.5, gpus=0)
    nodes = [Node(cpus=2, gpus=0)] * 3
    assert [spare_cpus(nodes, one, count) for count in (0, 2, 5, 9)] == [6, 4, 1, 0]
    assert spare_cpus(nodes[:2], half, 2) == 0
    assert spare_cpus([], one, 2) == 0
    both = [Node(cpus=1, gpus=1), Node(cpus=4, gpus=0)]
    assert spare_cpus(both, Need(cpus=1, gpus=1), 1) == 4
