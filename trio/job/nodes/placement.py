"""How many engines fit on which nodes: arithmetic only, no Ray in here.

Ray places an actor on one node as a whole, and a share of a GPU on one GPU. So totals over a
cluster say little: two nodes with one GPU each hold no engine that wants two.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trio.errors import UserError
from trio.tables import counted

UNBOUNDED = 1 << 30
# engines on a node when they take nothing of it
SLACK = 1e-6
# Ray counts resources in parts of 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What a node offers."""

    cpus: float
    # logical
    gpus: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one engine takes of its node."""

    cpus: float
    gpus: float

    def fits_on(self, node: Node) -> int:
        """Engines that the node holds."""
        by_gpus = _times(self.gpus, node.gpus)
        if 0 < self.gpus < 1:
            by_gpus = int(node.gpus) * _times(self.gpus, 1.0)
        return min(by_gpus, _times(self.cpus, node.cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a cluster has, and what the job takes of it."""

    cpus: float
    # logical
    gpus: float
    nodes: int
    actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    waiting: int = 0
    # engines that have no place on the nodes that are there now
    per_node: int = 1
    # most engines on one of these nodes, spread as evenly as they allow
    attached: bool = True
    # False for a Ray of our own in this process
    prepare_tasks: int = 1
    # that decode and preprocess images at a time
    prepare_cpus: float = 1.0
    # of each; 0 where engines leave none

    @property
    def need(self) -> Need:
        return Need(cpus=self.cpus_per_actor, gpus=self.gpus_per_actor)

    def describe(self) -> str:
        where = f"cluster of {self.nodes} nodes" if self.nodes > 1 else "1 node"
        where = where if self.attached else "local Ray"
        engine = f"{self.gpus_per_actor:g} GPU" if self.gpus_per_actor else "CPU"
        later = f" ({self.waiting} of them as nodes join)" if self.waiting else ""
        return (
            f"{where} with {self.cpus:g} CPUs and {self.gpus:g} GPUs;"
            f" {counted(self.actors, 'engine')} on {engine}{later};"
            f" {counted(self.prepare_tasks, 'task')} for images"
        )


def _times(need: float, there: float) -> int:
    return math.floor(there / need + SLACK) if need else UNBOUNDED


def describe(nodes: Sequence[Node]) -> str:
    """The nodes by kind, as in ``2 nodes with 8 CPUs and 1 GPUs each``."""
    kinds = Counter(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    each = [
        f"{count} nodes with {kind} each" if count > 1 else f"1 node with {kind}"
        for kind, count in kinds.items()
    ]
    return ", ".join(each) or "no node"


def place(
    nodes: Sequence[Node],
    *,
    actors: int | None,
    gpus_per_actor: float | None,
    cpus_per_actor: float,
    wait_s: float = 0.0,
) -> Resources:
    """What a job takes of the nodes.

    Args:
        nodes: what is there now.
        actors: engines asked for; None: as many as fit where there are GPUs, else one.
        gpus_per_actor: None: one where there are GPUs, else none.
        cpus_per_actor: logical CPUs.
        wait_s: above 0 nodes may be still to come, and what has no place now is no mistake.

    Raises:
        UserError: what is asked for has no place on these nodes, with the numbers.
    """
    there, gpus = any(node.gpus for node in nodes), gpus_per_actor
    if gpus is not None and gpus > 1 and gpus % 1:
        raise UserError(
            f"--gpus-per-actor {gpus:g}: Ray gives out a part of one GPU or whole GPUs;"
            " give a number below 1 or a whole one"
        )
    if wait_s and not there and (gpus is None or (gpus > 0 and actors is None)):
        raise UserError(
            f"--wait-for-nodes {wait_s:g}: no node has a GPU yet, so how many there will be cannot"
            " be seen; give both --actors and --gpus-per-actor (0 runs on the CPU)"
        )
    need = Need(cpus=cpus_per_actor, gpus=float(there) if gpus is None else gpus)
    slots = [need.fits_on(node) for node in nodes]
    fit = sum(slots)
    asked = actors or (max(1, fit) if need.gpus else 1)
    if fit < asked and not wait_s:
        raise UserError(
            f"{counted(asked, 'engine')} with {need.gpus:g} GPUs and {need.cpus:g} CPUs each:"
            f" {fit or 'none'} can be placed on what Ray has ({describe(nodes)}); lower"
            " --actors, --gpus-per-actor or --cpus-per-actor (0 is allowed), or where nodes are"
            " still to join give --wait-for-nodes SECONDS"
        )
    fit = min(fit, asked)
    return Resources(
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        nodes=len(nodes),
        actors=asked,
        gpus_per_actor=need.gpus,
        cpus_per_actor=need.cpus,
        waiting=asked - fit,
        per_node=max([1, *_spread(slots, fit)]),
    )


def _spread(slots: Sequence[int], engines: int) -> list[int]:
    """Engines on each node when each next one goes where the fewest are and one more fits."""
    taken = [0] * len(slots)
    fewest = [(0, number) for number, room in enumerate(slots) if room]
    for _ in range(engines):
        _, number = heapq.heappop(fewest)
        taken[number] += 1
        if taken[number] < slots[number]:
            heapq.heappush(fewest, (taken[number], number))
    return taken


def spare_cpus(nodes: Sequence[Node], need: Need, engines: int) -> int:
    """Whole CPUs that so many engines leave: halves of two nodes make no whole one."""
    slots = [need.fits_on(node) for node in nodes]
    held = _spread(slots, min(engines, sum(slots)))
    left = (node.cpus - here * need.cpus for node, here in zip(nodes, held, strict=True))
    return sum(math.floor(cpus + SLACK) for cpus in left)
