"""The KV cache's memory: which shape holds which requests, and how many. Loads no torch.

The cache keeps, for each group of layers between two pruning stages, one left-aligned rectangle
of `slots × capacity` tokens per layer. `KVBudget` decides the shape of these rectangles under a
budget in bytes; a group after a stage holds fewer tokens and therefore gets the smaller capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Need = tuple[int, ...]
"""Tokens a request may come to store, per layer group: prompt tokens left there plus output."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the cache: rows, and tokens per row in each layer group."""

    slots: int
    capacities: tuple[int, ...]

    def holds(self, other: Shape) -> bool:
        wide_enough = all(a >= b for a, b in zip(self.capacities, other.capacities, strict=True))
        return self.slots >= other.slots and wide_enough


class KVBudget:
    """Keeps account of who holds which part of the cache.

    `group_bytes`: bytes that one token takes in all layers of each group.
    `block`: capacities are multiples of this many tokens.
    """

    def __init__(
        self, *, budget: int, group_bytes: Sequence[int], max_slots: int, block: int = 64
    ) -> None:
        self.budget = self.most = budget
        self.group_bytes = tuple(group_bytes)
        self.max_slots = max_slots
        self.block = block
        self.shape = Shape(0, (0,) * len(self.group_bytes))
        self._needs: dict[int, Need] = {}

    @property
    def holders(self) -> int:
        return len(self._needs)

    def bytes_of(self, shape: Shape) -> int:
        per_slot = zip(shape.capacities, self.group_bytes, strict=True)
        return shape.slots * sum(capacity * size for capacity, size in per_slot)

    def bytes_alone(self, need: Need) -> int:
        """Bytes that a request takes with the cache all to itself."""
        return self.bytes_of(self._tight([need]))

    def fits(self, need: Need) -> bool:
        """Whether a request could ever be held, by the budget as it was set."""
        return self.bytes_alone(need) <= self.most

    def can_allocate(self, need: Need) -> bool:
        return self._grown(need) is not None

    def allocate(self, key: int, need: Need) -> Shape:
        """Reserve room for a request; returns the shape that the cache must now have."""
        assert key not in self._needs, f"{key!r} holds room already"
        shape = self._grown(need)
        assert shape is not None, "allocate without can_allocate"
        self._needs[key] = need
        self.shape = shape
        return shape

    def free(self, key: int) -> None:
        """Give a request's room back. The shape stays until other requests want another."""
        del self._needs[key]

    def undo(self, key: int, before: Shape) -> None:
        """Take back an `allocate` whose shape only some layers got, the others still as `before`:
        what is left is what all of them hold."""
        self.free(key)
        pairs = zip(before.capacities, self.shape.capacities, strict=True)
        self.shape = Shape(min(before.slots, self.shape.slots), tuple(map(min, pairs)))

    def _grown(self, need: Need) -> Shape | None:
        """The shape that holds one more request: with slack where it fits, tight if it must be."""
        if self.holders == self.max_slots:
            return None
        tight = self._tight([*self._needs.values(), need])
        if self.shape.holds(tight):
            return self.shape
        pairs = zip(self.shape.capacities, tight.capacities, strict=True)
        slots = min(self.max_slots, _power_of_two(tight.slots))
        slack = Shape(max(self.shape.slots, slots), tuple(max(pair) for pair in pairs))
        return next((s for s in (slack, tight) if self.bytes_of(s) <= self.budget), None)

    def _tight(self, needs: Sequence[Need]) -> Shape:
        widest = (max(tokens) for tokens in zip(*needs, strict=True))
        return Shape(len(needs), tuple(-(-tokens // self.block) * self.block for tokens in widest))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


TEXT_TOKENS = 64
"""Of the request that the plan is made for, beside one image: a chat template and a question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """For requests of one image with as many visual tokens as one can give (where the model sets
    no bound, of a usual size, or of the processor's limit if that is less), `TEXT_TOKENS` of text
    and the longest answer asked for.

    requests: how many run at once, by memory or by `max_running`, whichever is less.
    requests_unpruned: the same without pruning.
    """

    kv_budget_bytes: int
    """Memory set aside for keys and values."""
    max_running: int
    request_bytes: int
    """What such a request may come to take of it, pruned as set."""
    request_bytes_unpruned: int
    """The same without pruning."""

    @property
    def requests(self) -> int:
        return min(self.max_running, self.kv_budget_bytes // self.request_bytes)

    @property
    def requests_unpruned(self) -> int:
        return min(self.max_running, self.kv_budget_bytes // self.request_bytes_unpruned)

    def as_dict(self) -> dict[str, Any]:
        counts = {"requests": self.requests, "requests_unpruned": self.requests_unpruned}
        return asdict(self) | counts


def describe(plan: dict[str, Any]) -> str:
    """The plan in one line."""
    each, budget = plan["request_bytes"], plan["kv_budget_bytes"]
    unpruned = plan["request_bytes_unpruned"]
    return (
        f"{plan['requests']} requests at once: {budget / 1e9:.2f} GB for keys and values, "
        f"{each / 1e6:.1f} MB a request ({unpruned / 1e6:.1f} MB unpruned)"
    )
