"""Keys and values of all running requests, with a length of their own in each layer group.

A *group* is the run of layers between two pruning stages; its layers share their lengths. Every
layer has one left-aligned rectangle `[slots, K, capacity, E]`; running requests fill its first
rows without holes, so that a decode step reads plain slices. Only this module changes lengths.

Shapes: T packed tokens, B running requests, G layer groups, K key/value heads, E head dimension.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trio.decoder.attention import Branches
from trio.engine.kv_budget import KVBudget, Need, Shape


class KVCache:
    """Key/value store indexed by layer and request.

    `group_starts`: first layer of each group, rising, the first one 0.
    `budget`: bytes that the rectangles may take in all.
    `max_slots`: most requests that run at once.
    """

    def __init__(
        self,
        *,
        group_starts: Sequence[int],
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: int,
        max_slots: int,
    ) -> None:
        assert group_starts[0] == 0
        stops = [*group_starts[1:], num_layers]
        self.spans = tuple(zip(group_starts, stops, strict=True))
        self.order: list[int] = []
        self.rows = Rows(groups=len(self.spans), most=max_slots, device=device)
        self.generation = 0
        """Counts up whenever keys and values have moved to other tensors."""
        self._group_of = [bisect_right(group_starts, layer) - 1 for layer in range(num_layers)]
        self._lengths: list[list[int]] = [[] for _ in self.spans]
        token_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
        self.room = KVBudget(
            budget=budget,
            group_bytes=[(stop - start) * token_bytes for start, stop in self.spans],
            max_slots=max_slots,
        )
        self._dtype = dtype
        self._device = device
        self._row = (num_kv_heads, head_dim)
        self._keys = [self._rectangle(0, 0) for _ in range(num_layers)]
        self._values = [self._rectangle(0, 0) for _ in range(num_layers)]

    @property
    def allocated_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def used_bytes(self) -> int:
        pairs = zip(self._lengths, self.room.group_bytes, strict=True)
        return sum(sum(lengths) * size for lengths, size in pairs)

    def lengths_of(self, key: int) -> tuple[int, ...]:
        """Tokens stored for a request in each group."""
        slot = self.order.index(key)
        return tuple(lengths[slot] for lengths in self._lengths)

    def fits(self, need: Need) -> bool:
        return self.room.fits(need)

    def can_allocate(self, need: Need) -> bool:
        return self.room.can_allocate(need)

    def allocate(self, key: int, need: Need) -> None:
        """Give a request the next row, empty for now.

        Raises:
            MemoryError: the device has less memory than the budget; the budget is halved.
        """
        shape = self.room.shape
        wanted = self.room.allocate(key, need)
        if wanted != shape:
            try:
                self._reshape(wanted)
            except BaseException as error:  # halfway: some layers have the new shape
                self.room.undo(key, shape)
                if isinstance(error, torch.OutOfMemoryError):
                    self.room.budget //= 2
                    raise MemoryError(str(error)) from error
                raise
        self.order.append(key)
        self.rows.add()
        for lengths in self._lengths:
            lengths.append(0)

    def free(self, key: int) -> None:
        """Take a request out; the last row moves into the hole."""
        self.room.free(key)
        slot = self.order.index(key)
        last = len(self.order) - 1
        if slot != last:
            for layer, group in enumerate(self._group_of):
                filled = self._lengths[group][last]
                for tensor in (self._keys[layer], self._values[layer]):
                    tensor[slot, :, :filled] = tensor[last, :, :filled]
        self.rows.remove(slot)
        for row in (self.order, *self._lengths):
            row[slot] = row[last]
            row.pop()

    def scrub(self) -> None:
        """Zero what nobody holds: a NaN there would spoil whoever gets the place, since attention
        masks what is not filled by a weight of zero, and zero times NaN is NaN."""
        for layer, group in enumerate(self._group_of):
            slots, _, capacity, _ = self._keys[layer].shape
            lengths = [*self._lengths[group], *[0] * (slots - len(self.order))]
            place = torch.arange(capacity, device=self._device)
            free = place >= torch.tensor(lengths, device=self._device)[:, None]
            for tensor in (self._keys[layer], self._values[layer]):
                tensor.masked_fill_(free[:, None, :, None], 0)

    def prefill(self, keys: Sequence[int]) -> PrefillWriter:
        """Takes in the prompts of freshly allocated requests, packed in this order."""
        return PrefillWriter(self, [self.order.index(key) for key in keys])

    def branches(self, keys: Sequence[int], branches: Branches) -> BranchReader:
        """Reads the stored prompts of these requests, for continuations that are not stored."""
        return BranchReader(self, keys, branches)

    def start(
        self, keys: Sequence[int], tokens: Sequence[int], positions: Sequence[Sequence[int]]
    ) -> None:
        """Tell the rows of requests whose prompts are in what to go on with."""
        slots = [self.order.index(key) for key in keys]
        lengths = [[own[slot] for own in self._lengths] for slot in slots]
        self.rows.set(slots, tokens, positions, lengths)

    def extend(self) -> None:
        """Make room for one more token of every request."""
        for lengths in self._lengths:
            lengths[:] = [length + 1 for length in lengths]
        self.rows.length_GB[:, : len(self.order)] += 1

    def writer(self, rows: int | None = None) -> DecodeWriter:
        """Takes in the tokens that `extend` made room for, in `order`.

        `rows`: how many rows the step runs over, at least the requests and at most the slots; it
        then reads all that could be stored, so that its shapes stay the same for some time.
        """
        if rows is None:
            return DecodeWriter(self, len(self.order), [max(own) for own in self._lengths])
        return DecodeWriter(self, rows, list(self.room.shape.capacities))

    def _reshape(self, shape: Shape) -> None:
        self.generation += 1
        for layer, group in enumerate(self._group_of):
            rows, filled = len(self.order), max(self._lengths[group], default=0)
            for tensors in (self._keys, self._values):
                old = tensors[layer]
                tensors[layer] = self._rectangle(shape.slots, shape.capacities[group])
                tensors[layer][:rows, :, :filled] = old[:rows, :, :filled]

    def _rectangle(self, slots: int, capacity: int) -> Tensor:
        heads, dim = self._row
        # Zeros: attention masks what is not filled, but a stray NaN times zero is NaN.
        return torch.zeros(slots, heads, capacity, dim, dtype=self._dtype, device=self._device)


class PrefillWriter:
    """The cache as a prefill sees it: stores packed keys and values, hands them on unchanged."""

    def __init__(self, cache: KVCache, slots: list[int]) -> None:
        self._cache = cache
        self._slots = slots
        self._place: tuple[Tensor, Tensor] | None = None

    def begin_prefill(self, layer: int, lengths: Sequence[int]) -> None:
        """From this layer on, the packed tokens are `lengths[i]` of the i-th request."""
        cache = self._cache
        assert (layer, len(lengths)) in {(start, len(self._slots)) for start, _ in cache.spans}
        for group in range(cache._group_of[layer], len(cache.spans)):
            for slot, length in zip(self._slots, lengths, strict=True):
                cache._lengths[group][slot] = length
        count = torch.tensor(lengths)
        slots_T = torch.tensor(self._slots).repeat_interleave(count)
        places_T = torch.cat([torch.arange(length) for length in lengths])
        self._place = (slots_T.to(cache._device), places_T.to(cache._device))

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[1, K, T, E]` of one layer in."""
        assert self._place is not None, "update before begin_prefill"
        slots_T, places_T = self._place
        self._cache._keys[layer_idx][slots_T, :, places_T] = key[0].transpose(0, 1)
        self._cache._values[layer_idx][slots_T, :, places_T] = value[0].transpose(0, 1)
        return key, value


class BranchReader:
    """The cache as continuations of stored requests see it: they read it and are not stored.

    `branches`: of the requests `keys`, in this order.
    """

    def __init__(self, cache: KVCache, keys: Sequence[int], branches: Branches) -> None:
        self._cache = cache
        self._slots = [cache.order.index(key) for key in keys]
        self._branches = branches
        self._width = 0

    def begin(self, group: int) -> Branches:
        """How new tokens see the keys of the layers of this group, whose `update` follows."""
        lengths = [self._cache._lengths[group][slot] for slot in self._slots]
        self._width = max(lengths)
        return self._branches.behind(torch.tensor(lengths, device=self._cache._device), self._width)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stored and new keys and values of a layer, `[B, K, L + W, E]`, for new `[1, K, T, E]`."""
        both = []
        for tensor, new in (
            (self._cache._keys[layer_idx], key),
            (self._cache._values[layer_idx], value),
        ):
            stored = tensor[self._slots, :, : self._width]
            both.append(torch.cat([stored, self._branches.rectangle(new)], dim=2))
        return both[0], both[1]


class DecodeWriter:
    """The cache as one decode step sees it: one token of each of its first `rows` rows.

    `widths`: per group, how many places of each row are read; what a row does not fill is masked.
    """

    def __init__(self, cache: KVCache, rows: int, widths: list[int]) -> None:
        self._cache = cache
        self._widths = widths
        self._rows_B = torch.arange(rows, device=cache._device)
        self.length_GB = cache.rows.length_GB[:, :rows]
        self._last_GB = self.length_GB - 1

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[1, K, B, E]` in; returns all stored of this layer, `[B, K, L, E]`."""
        group = self._cache._group_of[layer_idx]
        stored = []
        for tensor, new in (
            (self._cache._keys[layer_idx], key),
            (self._cache._values[layer_idx], value),
        ):
            tensor[self._rows_B, :, self._last_GB[group]] = new[0].transpose(0, 1)
            stored.append(tensor[: len(self._rows_B), :, : self._widths[group]])
        return stored[0], stored[1]


class Rows:
    """One row per running request, in the cache's order, without holes.

    token_B: the token to feed next. position_GB: where it stands, per layer group. length_GB: keys
    and values stored. Rows past the last request hold a length of 1, so that a step may run over
    more rows than there are requests. The tensors stay where they are for good.
    """

    def __init__(self, *, groups: int, most: int, device: torch.device) -> None:
        self.count = 0
        self.token_B = torch.zeros(most, dtype=torch.int64, device=device)
        self.position_GB = torch.zeros(groups, most, dtype=torch.int64, device=device)
        self.length_GB = torch.ones(groups, most, dtype=torch.int64, device=device)

    def add(self) -> None:
        """A row at the end, to be filled by `set`."""
        self.count += 1

    def set(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        """Fill rows; `positions` and `lengths` are given per row, then per group."""
        device = self.token_B.device
        index = torch.tensor(rows, device=device)
        self.token_B[index] = torch.tensor(tokens, device=device)
        self.position_GB[:, index] = torch.tensor(positions, device=device).T
        self.length_GB[:, index] = torch.tensor(lengths, device=device).T

    def remove(self, row: int) -> None:
        """Take a row out; the last one moves into the hole."""
        self.count -= 1
        for tensor in (self.token_B, self.position_GB, self.length_GB):
            tensor[..., row] = tensor[..., self.count]
        self.length_GB[:, self.count] = 1
        self.position_GB[:, self.count] = 0
