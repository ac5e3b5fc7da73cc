"""Pages of the KV cache: which requests they hold, and how many. Loads no torch.

A page is `PAGE` tokens of one layer. A request takes whole pages of each layer, for its prompt as
pruning leaves it there and for its whole answer; pages serve any layer, so that no memory is set
aside for layers behind a stage that those before it could not use.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Need = tuple[int, ...]
"""Tokens a request may come to store, per layer group: prompt tokens left there plus output."""

PAGE = 16
"""Tokens of a page. Half a page of each layer is lost to a request: of the 100 tokens that pruning
may leave, 8 % with 16 tokens, 16 % with 32."""

PageRange = tuple[int, int]
"""Neighbouring pages `start … stop-1`."""


class PageAllocator:
    """Keeps account of who holds which pages.

    Page 0 belongs to nobody: what is stored for no request goes there.

    `pages`: to be given out, numbered from 1. `group_layers`: layers of each group. `max_running`:
    most requests at once. `together`: a request's pages of a layer are neighbours, in order.
    """

    def __init__(
        self, *, pages: int, group_layers: Sequence[int], max_running: int, together: bool = False
    ) -> None:
        self.pages = pages
        self.group_layers = tuple(group_layers)
        self.max_running = max_running
        self.together = together
        self._free = FreePages(1, pages + 1)
        self._held: dict[int, list[PageRange]] = {}

    @property
    def holders(self) -> int:
        return len(self._held)

    @property
    def free_pages(self) -> int:
        return self._free.count

    def pages_of(self, need: Need) -> int:
        pairs = zip(need, self.group_layers, strict=True)
        return sum(-(-tokens // PAGE) * layers for tokens, layers in pairs)

    def fits(self, need: Need) -> bool:
        """Whether a request could ever be held."""
        return self.pages_of(need) <= self.pages

    def count_fitting(self, needs: Iterable[Need]) -> int:
        """How many of these, from the first on, there is room for at once."""
        free, fitting = self._free.copy(), 0
        for need in needs:
            if self.holders + fitting == self.max_running or self._taken(free, need) is None:
                break
            fitting += 1
        return fitting

    def allocate(self, key: int, need: Need) -> list[NDArray[np.int32]] | None:
        """Give a request its pages, of each layer in the order of its tokens; None where there is
        no room for it now."""
        assert key not in self._held, f"{key!r} holds pages already"
        runs = None
        if self.holders < self.max_running:
            runs = self._taken(self._free, need)
        if runs is None:
            return None
        self._held[key] = runs
        counts = self._per_layer(need)
        pages = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in runs])
        return np.split(pages, np.cumsum(counts)[:-1])

    def free(self, key: int) -> None:
        """Give a request's pages back."""
        for start, stop in self._held.pop(key):
            self._free.give(start, stop)

    def _taken(self, free: FreePages, need: Need) -> list[PageRange] | None:
        counts = self._per_layer(need)
        return free.take_together(counts) if self.together else free.take(sum(counts))

    def _per_layer(self, need: Need) -> list[int]:
        counts: list[int] = []
        for tokens, layers in zip(need, self.group_layers, strict=True):
            counts += [-(-tokens // PAGE)] * layers
        return counts


class FreePages:
    """Free pages as runs of neighbours, in rising order."""

    def __init__(self, start: int, stop: int) -> None:
        self._starts, self._stops = ([start], [stop]) if stop > start else ([], [])
        self.count = stop - start

    def copy(self) -> FreePages:
        made = FreePages(0, 0)
        made._starts, made._stops, made.count = self._starts[:], self._stops[:], self.count
        return made

    def take(self, pages: int) -> list[PageRange] | None:
        """Any so many; None where there are fewer."""
        if pages > self.count:
            return None
        self.count -= pages
        runs: list[PageRange] = []
        while pages:
            start, stop = self._starts[-1], self._stops[-1]
            if stop - start <= pages:
                self._starts.pop()
                self._stops.pop()
            else:
                start = stop - pages
                self._stops[-1] = start
            runs.append((start, stop))
            pages -= stop - start
        return runs

    def take_together(self, counts: Sequence[int]) -> list[PageRange] | None:
        """So many neighbours of each count, best of all one behind another; None where there are
        none, and none is taken then."""
        whole = self._take_run(sum(counts))
        if whole is not None:
            return [whole]
        runs = [self._take_run(pages) for pages in counts]
        found = [run for run in runs if run is not None]
        if len(found) == len(counts):
            return found
        for start, stop in found:
            self.give(start, stop)
        return None

    def give(self, start: int, stop: int) -> None:
        self.count += stop - start
        place = bisect(self._starts, start)
        if place and self._stops[place - 1] == start:
            place -= 1
            start = self._starts.pop(place)
            self._stops.pop(place)
        if place < len(self._starts) and self._starts[place] == stop:
            self._starts.pop(place)
            stop = self._stops.pop(place)
        self._starts.insert(place, start)
        self._stops.insert(place, stop)

    def _take_run(self, pages: int) -> PageRange | None:
        """The lowest neighbours, so that what has never been written stays out of memory."""
        for place, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            if stop - start >= pages:
                self.count -= pages
                self._starts[place] = start + pages
                if start + pages == stop:
                    self._starts.pop(place)
                    self._stops.pop(place)
                return start, start + pages
        return None


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
