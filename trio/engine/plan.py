"""How many requests the memory holds at once, told before the first one runs. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TEXT_TOKENS = 64
"""Of the request that the plan is made for, beside one image: a chat template and a question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """For requests of one image with as many visual tokens as one can give (where the model sets
    no bound, of a usual size, or of the processor's limit if that is less), `TEXT_TOKENS` of text
    and the longest answer asked for.

    kv_budget_bytes: memory set aside for keys and values.
    request_bytes: what such a request may come to take of it, pruned as set.
    request_bytes_unpruned: the same without pruning.
    requests: how many run at once, by memory or by `max_running`, whichever is less.
    requests_unpruned: the same without pruning.
    """

    kv_budget_bytes: int
    max_running: int
    request_bytes: int
    request_bytes_unpruned: int

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
