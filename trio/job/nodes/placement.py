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

    def describe(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one engine takes of its node."""

    cpus: float
    gpus: float

    def describe(self) -> str:
        return f"{self.gpus:g} GPUs and {self.cpus:g} CPUs each"

    def fits_on(self, node: Node) -> int:
        """Engines that the node holds."""
        return min(_by_gpus(self.gpus, node.gpus), _times(self.cpus, node.cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How many engines there will be, and how many of them have a place already."""

    actors: int
    fit: int
    # of them on the nodes that are there now
    per_node: int
    # most on one of the nodes that are there, spread as evenly as they allow; at least 1
    need: Need
    note: str
    # what somebody would want to know who pays for these nodes; may be empty


def _times(need: float, there: float) -> int:
    return math.floor(there / need + SLACK) if need else UNBOUNDED


def _by_gpus(need: float, there: float) -> int:
    return int(there) * _times(need, 1.0) if 0 < need < 1 else _times(need, there)


def describe(nodes: Sequence[Node]) -> str:
    """The nodes by kind, as in ``2 nodes with 8 CPUs and 1 GPUs each``."""
    kinds = Counter(node.describe() for node in nodes)
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
) -> Placement:
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
    there = any(node.gpus for node in nodes)
    _check_asked(actors, gpus_per_actor, wait_s, there=there)
    gpus = gpus_per_actor if gpus_per_actor is not None else float(there)
    need = Need(cpus=cpus_per_actor, gpus=gpus)
    slots = [need.fits_on(node) for node in nodes]
    fit, asked = sum(slots), actors
    if asked is None:
        asked = max(1, fit) if gpus else 1
    if fit < asked and not wait_s:
        raise UserError(refusal(nodes, need, asked, fit))
    return Placement(
        actors=asked,
        fit=min(fit, asked),
        per_node=max([1, *_spread(slots, min(fit, asked))]),
        need=need,
        note=_note(nodes, need, asked, fit, chosen=actors is not None, wait_s=wait_s),
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


def _check_asked(
    actors: int | None, gpus_per_actor: float | None, wait_s: float, *, there: bool
) -> None:
    if gpus_per_actor is not None and gpus_per_actor > 1 and gpus_per_actor % 1:
        raise UserError(
            f"--gpus-per-actor {gpus_per_actor:g}: Ray gives out a part of one GPU or whole GPUs;"
            " give a number below 1 or a whole one"
        )
    unclear = gpus_per_actor is None or (gpus_per_actor > 0 and actors is None)
    if wait_s and not there and unclear:
        raise UserError(
            f"--wait-for-nodes {wait_s:g}: no node has a GPU yet, so how many there will be cannot"
            " be seen; give both --actors and --gpus-per-actor (0 runs on the CPU)"
        )


def refusal(nodes: Sequence[Node], need: Need, asked: int, fit: int) -> str:
    """Why this many engines have no place, and what to do."""
    engines = f"{asked} engines" if asked > 1 else "1 engine"
    less = "lower --actors" if fit else "lower --gpus-per-actor (0 runs on the CPU)"
    also = "" if need.cpus == 0 else " or --cpus-per-actor (0 is allowed)"
    return (
        f"{engines} with {need.describe()}: {fit or 'none'} can be placed on what Ray has"
        f" ({describe(nodes)}); {less}{also}, or where nodes are still to join give"
        " --wait-for-nodes SECONDS"
    )


def _note(
    nodes: Sequence[Node], need: Need, asked: int, fit: int, *, chosen: bool, wait_s: float
) -> str:
    if fit < asked:
        return (
            f"{fit} of them fit now on {describe(nodes)}, the others start as nodes join;"
            f" without any after {wait_s:g} s the job fails"
        )
    if chosen or not need.gpus:
        return ""
    idle = sum(node.gpus - need.gpus * need.fits_on(node) for node in nodes)
    if idle < SLACK:
        return ""
    by_cpus = sum(_by_gpus(need.gpus, node.gpus) for node in nodes) > fit
    reason = f"--cpus-per-actor {need.cpus:g}" if by_cpus else f"--gpus-per-actor {need.gpus:g}"
    return f"{idle:g} GPUs stay idle: {reason} allows no more on {describe(nodes)}"
