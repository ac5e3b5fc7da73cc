"""Keys and values of all running requests, paged, with a length of their own in each layer group.

A *group* is the run of layers between two pruning stages; its layers share their lengths. One pool
of pages serves all layers and is never made anew; a table says which pages of a layer are a
request's. Running requests fill the table's first rows without holes. Only this module changes
lengths.

On a GPU a page holds token after token, and a request's pages lie anywhere. On a CPU a request's
pages of a layer are neighbours and hold head after head, which attention reads in place. What is
not filled may be anything, and is never read.

Shapes: T packed tokens, B running requests, G layer groups, N layers, W pages of one request and
layer at most, K key/value heads, E head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio.decoder.attention import Branches, InRuns, Paged, Run
from trio.decoder.gpu import on_gpu, sent
from trio.engine.kv_budget import PAGE, TEXT_TOKENS, Need, PageAllocator
from trio.errors import UserError, first_line

_log = logging.getLogger(__name__)
_FIRST_WIDTH = 16
"""Pages of a request and layer that the table has room for at first."""


class KVCache:
    """Key/value store indexed by layer and request.

    `group_starts`: first layer of each group, rising, the first one 0.
    `budget`: bytes of all pages; where the device has less, one line says what it is.
    `max_running`: most requests that run at once.

    Raises:
        UserError: no room for the shortest request.
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
        max_running: int,
    ) -> None:
        assert group_starts[0] == 0
        stops = [*group_starts[1:], num_layers]
        self.spans = tuple(zip(group_starts, stops, strict=True))
        self.order: list[int] = []
        self.rows = Rows(groups=len(self.spans), most=max_running, device=device)
        self.generation = 0
        """Counts up whenever the table has moved to another tensor."""
        self._device = device
        self._layers_of_group = [stop - start for start, stop in self.spans]
        self._group_N = np.repeat(np.arange(len(self.spans)), self._layers_of_group)
        self._group_of_layer_N = torch.from_numpy(self._group_N).to(device)
        self._page_shape = PAGE, num_kv_heads, head_dim
        self.page_bytes = 2 * PAGE * num_kv_heads * head_dim * dtype.itemsize
        self.pool, pages = self._pool(budget // self.page_bytes - 1, dtype)
        self.room = PageAllocator(
            pages=pages,
            group_layers=self._layers_of_group,
            max_running=max_running,
            together=not on_gpu(device),
        )
        self._lengths = np.zeros((len(self.spans), max_running), dtype=np.int64)
        self._most = np.zeros_like(self._lengths)
        """Tokens that each request has room for."""
        self._table = np.zeros((num_layers, max_running, _FIRST_WIDTH), dtype=np.int32)
        self._apart = on_gpu(device)
        """Whether the device's table is memory of its own."""
        self._table_on_device = self._brought(self._table)
        self._unsent: set[int] = set()
        """Rows of the table that the device does not have yet."""
        self._is_short = False
        """Whether the table could not grow when it was to."""
        self._runs: Runs | None = None

    @property
    def budget(self) -> int:
        """Bytes of all pages that requests can have."""
        return self.room.pages * self.page_bytes

    @property
    def allocated_bytes(self) -> int:
        return self.pool.nbytes

    @property
    def used_bytes(self) -> int:
        tokens = self._lengths[:, : len(self.order)].sum(axis=1) @ np.array(self._layers_of_group)
        return int(tokens) * (self.page_bytes // PAGE)

    def bytes_of(self, need: Need) -> int:
        """Bytes of the pages that a request takes."""
        return self.room.pages_of(need) * self.page_bytes

    def lengths_of(self, key: int) -> tuple[int, ...]:
        """Tokens stored for a request in each group."""
        return tuple(self._lengths[:, self.order.index(key)].tolist())

    def fits(self, need: Need) -> bool:
        return self.room.fits(need)

    def count_fitting(self, needs: Iterable[Need]) -> int:
        return self.room.count_fitting(needs)

    def allocate(self, key: int, need: Need) -> int | None:
        """Give a request the next row, which is returned, and its pages, empty for now; None where
        there is no room now.

        Raises:
            torch.OutOfMemoryError: the table has no room to grow, and nobody holds any.
        """
        if not self._is_wide(-(-max(need) // PAGE)):
            return None
        pages = self.room.allocate(key, need)
        if pages is None:
            return None
        row = len(self.order)
        self._table[:, row] = 0
        for layer, own in enumerate(pages):
            self._table[layer, row, : len(own)] = own
        self._lengths[:, row], self._most[:, row] = 0, need
        self.order.append(key)
        self.rows.count += 1
        self._changed(row)
        return row

    def free(self, key: int) -> None:
        """Take a request out; the last row moves into the hole."""
        self.room.free(key)
        row, last = self.order.index(key), len(self.order) - 1
        self.order[row] = self.order[last]
        self.order.pop()
        self.rows.remove(row)
        for table in self._tables:
            table[:, row] = table[:, last]
            table[:, last] = 0
        if last in self._unsent:
            self._unsent.remove(last)
            self._unsent.add(row)
        self._runs = None

    def release(self) -> None:
        """Give the memory back; nothing can be stored any more."""
        self.pool = self.pool.new_empty(0)

    def prefill(self, keys: Sequence[int]) -> PrefillWriter:
        """Takes in the prompts of freshly allocated requests, packed in this order."""
        return PrefillWriter(self, [self.order.index(key) for key in keys])

    def branches(self, keys: Sequence[int], branches: Branches) -> BranchReader:
        """Reads the stored prompts of these requests, for continuations that are not stored."""
        return BranchReader(self, [self.order.index(key) for key in keys], branches)

    def start(
        self, keys: Sequence[int], tokens: Sequence[int], positions: Sequence[Sequence[int]]
    ) -> None:
        """Tell the rows of requests whose prompts are in what to go on with.

        Args:
            tokens: to feed next.
            positions: of these, per request and layer group.
        """
        rows = [self.order.index(key) for key in keys]
        self.rows.set(rows, tokens, positions, self._lengths[:, rows].T.tolist())
        self._runs = None

    def extend(self) -> None:
        """Make room for one more token of every request, at the next position."""
        lengths_GB = self._lengths[:, : len(self.order)]
        lengths_GB += 1
        assert (lengths_GB <= self._most[:, : len(self.order)]).all(), "more tokens than reserved"
        self.rows.advance()
        if self._runs is not None:
            self._runs.advance()

    def writer(self, rows: int | None = None) -> DecodeWriter | RunsWriter:
        """Takes in the tokens that `extend` made room for, in `order`.

        `rows`: how many rows of the table the step runs over, at least the requests.
        """
        if not self.room.together:
            return DecodeWriter(self, len(self.order) if rows is None else rows)
        assert rows in (None, len(self.order)), "rows that no request has"
        if self._runs is None:
            self._runs = Runs(self)
        return RunsWriter(self.pool, self._runs)

    @property
    def _tables(self) -> Iterator[Any]:
        """What has a column for each row."""
        yield from (self._lengths, self._most, self._table)
        if self._apart:
            yield self._table_on_device

    def _pool(self, pages: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Memory of so many pages or fewer, and how many; one more belongs to nobody."""
        wanted = pages
        least = sum(self._layers_of_group) * -(-(TEXT_TOKENS + 1) // PAGE)
        while pages >= least:
            shape = (2, pages + 1, *self._page_shape)
            try:
                # On a CPU memory that has never been written is not there yet.
                pool = torch.empty(shape, dtype=dtype, device=self._device)
            except RuntimeError as error:  # out of memory, as torch says it for a CPU and a GPU
                if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                    raise
                pages //= 2
                continue
            if pages < wanted:
                got, asked = pages * self.page_bytes / 1e9, wanted * self.page_bytes / 1e9
                _log.warning("%.2f GB for keys and values: there is no room for %.2f", got, asked)
            return pool, pages
        raise UserError(
            f"no memory for the keys and values of a prompt of {TEXT_TOKENS} tokens: "
            f"{least * self.page_bytes / 1e6:.1f} MB are needed, and "
            f"{max(0, wanted) * self.page_bytes / 1e6:.1f} MB were to be had; a smaller "
            "batch_tokens leaves more of a GPU for them"
        )

    def _is_wide(self, pages: int) -> bool:
        """Whether the table has room for requests of so many pages in a layer, or has it now."""
        try:
            self._widen(pages)
        except torch.OutOfMemoryError as error:
            if not self.order:
                raise
            if not self._is_short:
                why = first_line(error)
                _log.warning("requests wait, as the table of pages cannot grow: %s", why)
            self._is_short = True
            return False
        self._is_short = False
        return True

    def _widen(self, pages: int) -> None:
        width = self._table.shape[2]
        if pages <= width:
            return
        while width < pages:
            width *= 2
        more = width - self._table.shape[2]
        table = np.pad(self._table, ((0, 0), (0, 0), (0, more)))
        # Where there is no memory for this one, the old ones stay as they are.
        on_device = self._brought(table)
        self._table, self._table_on_device = table, on_device
        self._unsent.clear()
        self.generation += 1

    def _brought(self, table: NDArray[np.int32]) -> Tensor:
        """The table on the device."""
        return torch.from_numpy(table).to(self._device, copy=self._apart)

    def _changed(self, row: int) -> None:
        if self._apart:
            self._unsent.add(row)
        self._runs = None

    def _send(self) -> None:
        """Bring the table on the device up to date."""
        if self._unsent:
            rows = sorted(self._unsent)
            self._unsent.clear()
            own = sent(torch.from_numpy(self._table[:, rows]), self._device)
            index = sent(torch.tensor(rows), self._device)
            self._table_on_device.index_copy_(1, index, own)

    def _piece(self, layer: int, row: int) -> Run:
        """Where a row's keys are, of those whose pages are neighbours."""
        group = self._group_N[layer]
        page, heads, dim = self._page_shape
        pages = int(np.count_nonzero(self._table[layer, row]))
        start = int(self._table[layer, row, 0]) * page * heads * dim
        return Run(1, int(self._lengths[group, row]), pages * page * dim, start, 0)

    def _places(self, layers: slice, row_T: Tensor, place_T: Tensor) -> Tensor:
        """Where in the pool tokens lie, counted in tokens: `[layers, T]`, on the device."""
        pages = self._table_on_device[layers, row_T, place_T // PAGE]
        return pages.long() * PAGE + place_T % PAGE


class PrefillWriter:
    """The cache as a prefill sees it: stores packed keys and values, hands them on unchanged."""

    def __init__(self, cache: KVCache, rows: list[int]) -> None:
        self._cache = cache
        self._rows = rows
        self._first = 0
        self._lengths: list[int] = []
        self._places_NT: Tensor | None = None
        cache._send()

    def begin_prefill(self, layer: int, lengths: Sequence[int]) -> None:
        """From this layer on, the packed tokens are `lengths[i]` of the i-th request."""
        cache = self._cache
        assert (layer, len(lengths)) in {(start, len(self._rows)) for start, _ in cache.spans}
        self._first, self._lengths = layer, list(lengths)
        cache._lengths[cache._group_N[layer] :, self._rows] = lengths
        if not cache.room.together:
            self._places_NT = self._places(layer, lengths)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[1, K, T, E]` of one layer in."""
        assert self._lengths, "update before begin_prefill"
        pool = self._cache.pool
        for pages, new in ((pool[0], key), (pool[1], value)):
            if self._places_NT is None:
                self._store_runs(pages, new[0], layer_idx)
            else:
                index_T = self._places_NT[layer_idx - self._first]
                pages.flatten(0, 1).index_copy_(0, index_T, new[0].transpose(0, 1))
        return key, value

    def _places(self, layer: int, lengths: Sequence[int]) -> Tensor:
        """Of all tokens in this layer and those behind it."""
        row_T = np.repeat(self._rows, lengths)
        place_T = np.concatenate([np.arange(length) for length in lengths])
        both = sent(torch.from_numpy(np.stack([row_T, place_T])), self._cache._device)
        return self._cache._places(slice(layer, None), both[0], both[1])

    def _store_runs(self, pages: Tensor, new_KTE: Tensor, layer: int) -> None:
        for row, own_KSE in zip(self._rows, new_KTE.split(self._lengths, dim=1), strict=True):
            self._cache._piece(layer, row).view(pages)[0].copy_(own_KSE)


class BranchReader:
    """The cache as continuations of stored requests see it: they read it and are not stored.

    `branches`: of the requests in these rows.
    """

    def __init__(self, cache: KVCache, rows: list[int], branches: Branches) -> None:
        self._cache = cache
        self._rows = rows
        self._rows_B = sent(torch.tensor(rows), cache._device)
        self._branches = branches
        self._width = 0
        self._stored_B = self._rows_B

    def begin(self, group: int) -> Branches:
        """How new tokens see the keys of the layers of this group, whose `update` follows."""
        lengths = self._cache._lengths[group, self._rows]
        self._width = int(lengths.max())
        self._stored_B = sent(torch.from_numpy(lengths), self._cache._device)
        return self._branches.behind(self._stored_B, self._width)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stored and new keys and values of a layer, `[B, K, L + W, E]`, for new `[1, K, T, E]`."""
        stored = self._in_runs if self._cache.room.together else self._in_pages
        pool = self._cache.pool
        pairs = (stored(pool[0], layer_idx), key), (stored(pool[1], layer_idx), value)
        both = [torch.cat([old, self._branches.rectangle(new)], dim=2) for old, new in pairs]
        return both[0], both[1]

    def _in_runs(self, pages: Tensor, layer: int) -> Tensor:
        kv_heads, dim = pages.shape[2:]
        out = pages.new_zeros(len(self._rows), kv_heads, self._width, dim)
        for row, own in zip(self._rows, out, strict=True):
            piece = self._cache._piece(layer, row)
            own[:, : piece.length] = piece.view(pages)[0]
        return out

    def _in_pages(self, pages: Tensor, layer: int) -> Tensor:
        table = self._cache._table_on_device[layer]
        table_BW = table.index_select(0, self._rows_B)[:, : -(-self._width // PAGE)]
        return Paged(table_BW, self._stored_B).gathered(pages)[:, :, : self._width]


class DecodeWriter:
    """The cache as one decode step sees it: one token of each of its first `rows` rows."""

    def __init__(self, cache: KVCache, rows: int) -> None:
        self._pool = cache.pool
        self._table_NBW = cache._table_on_device[:, :rows]
        self._group_N = cache._group_N
        self._length_GB = cache.rows.length_GB[:, :rows]
        last_GB = (self._length_GB - 1).clamp(min=0)
        last_NB = last_GB[cache._group_of_layer_N]
        page_NB1 = self._table_NBW.gather(2, (last_NB // PAGE)[..., None])
        self._place_NB = page_NB1[..., 0] * PAGE + last_NB % PAGE

    def layout(self, layer: int) -> Paged:
        """How the tokens see what `update` gives for this layer."""
        return Paged(self._table_NBW[layer], self._length_GB[self._group_N[layer]])

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[1, K, B, E]` in; returns the pages, `[pages, PAGE, K, E]`."""
        keys, values = self._pool[0], self._pool[1]
        for pages, new in ((keys, key), (values, value)):
            place_B = self._place_NB[layer_idx]
            pages.flatten(0, 1).index_copy_(0, place_B, new[0].transpose(0, 1))
        return keys, values


class Runs:
    """Where the keys of the running requests lie on a CPU, for steps until a request comes or goes.

    Requests of equal lengths that lie at equal distances are read together.
    """

    def __init__(self, cache: KVCache) -> None:
        self.steps = 0
        """Since this was made."""
        count, (page, heads, dim) = len(cache.order), cache._page_shape
        table_NBW = cache._table[:, :count]
        start_NB = table_NBW[..., 0].astype(np.int64) * page * heads * dim
        head_NB = np.count_nonzero(table_NBW, axis=2) * page * dim
        length_NB = cache._lengths[cache._group_N, :count]
        self._made = [
            _runs([Run(1, *one, 0) for one in zip(*of_layer, strict=True)])
            for of_layer in zip(
                length_NB.tolist(), head_NB.tolist(), start_NB.tolist(), strict=True
            )
        ]
        first_NBK = start_NB[..., None] + head_NB[..., None] * np.arange(heads)
        place_NBK = first_NBK // dim + length_NB[..., None] - 1
        self.place_NL = torch.from_numpy(place_NBK.reshape(len(place_NBK), -1))
        """Where in the pool the newest token of each request and head lies, counted in heads."""

    def advance(self) -> None:
        self.steps += 1
        self.place_NL += 1

    def layout(self, layer: int) -> InRuns:
        runs, order_B = self._made[layer]
        return InRuns([run._replace(length=run.length + self.steps) for run in runs], order_B)


def _runs(pieces: list[Run]) -> tuple[list[Run], Tensor | None]:
    """Of a layer's requests, with their order as of `InRuns`."""
    order = sorted(range(len(pieces)), key=lambda row: pieces[row][1:4])
    runs: list[Run] = []
    for row in order:
        joined = _joined(runs[-1], pieces[row]) if runs else None
        if joined is None:
            runs.append(pieces[row])
        else:
            runs[-1] = joined
    return runs, None if order == list(range(len(pieces))) else torch.tensor(order)


def _joined(run: Run, one: Run) -> Run | None:
    """With one more request, if it is like the others and lies at their distance."""
    if (run.length, run.heads) != (one.length, one.heads):
        return None
    step = one.start - run.start if run.requests == 1 else run.step
    if one.start != run.start + run.requests * step:
        return None
    return run._replace(requests=run.requests + 1, step=step)


class RunsWriter:
    """As `DecodeWriter`, on a CPU."""

    def __init__(self, pool: Tensor, runs: Runs) -> None:
        self._pool = pool
        self._runs = runs

    def layout(self, layer: int) -> InRuns:
        return self._runs.layout(layer)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[1, K, B, E]` in; returns the pages, `[pages, PAGE, K, E]`."""
        keys, values = self._pool[0], self._pool[1]
        place_L = self._runs.place_NL[layer_idx]
        for pages, new in ((keys, key), (values, value)):
            new_LE = new[0].transpose(0, 1).reshape(len(place_L), -1)
            pages.flatten(0, 2).index_copy_(0, place_L, new_LE)
        return keys, values


class Rows:
    """One row per running request, in the cache's order, without holes.

    token_B: the token to feed next. position_GB: where the newest token stands, per layer group.
    length_GB: keys and values stored. Rows past the last request hold zeros, so that a step may run
    over more rows than there are requests. The tensors stay where they are for good.
    """

    def __init__(self, *, groups: int, most: int, device: torch.device) -> None:
        self.count, self.most = 0, most
        self._state = torch.zeros(1 + 2 * groups, most, dtype=torch.int64, device=device)
        self.token_B = self._state[0]
        self.position_GB = self._state[1 : 1 + groups]
        self.length_GB = self._state[1 + groups :]

    def set(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        """Fill rows; `positions` of the tokens and `lengths` are given per row, then per group."""
        newest = [[position - 1 for position in own] for own in positions]
        columns = zip(rows, tokens, newest, lengths, strict=True)
        given = [[row, token, *own, *stored] for row, token, own, stored in columns]
        all_BS = sent(torch.tensor(given), self._state.device)
        self._state.index_copy_(1, all_BS[:, 0], all_BS[:, 1:].T)

    def advance(self) -> None:
        """One token more of every request, one position further."""
        self._state[1:, : self.count] += 1

    def remove(self, row: int) -> None:
        """Take a row out; the last one moves into the hole."""
        self.count -= 1
        self._state[:, row] = self._state[:, self.count]
        self._state[:, self.count] = 0
