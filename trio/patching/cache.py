"""KV cache of a patched model: every layer and every row has its own length.

Shapes: B rows, K key/value heads, C columns (capacity), E head dim, T tokens of all rows back to
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from trio.decoder.cache_argument import CACHE
from trio.errors import UserError

GROWTH = 64  # columns added when a layer is full
# A sliding window is no matter while the sequence is shorter, which the caller checks.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class RaggedLayer(CacheLayerMixin):
    """One decoder layer's keys and values, left-aligned: row b fills lengths_B[b] columns.

    `get_seq_length()` is the *logical* length, that of the unpruned and padded token sequence,
    because `generate` slices token ids and grows masks by it. What is stored is `lengths_B`.
    """

    is_sliding = False
    is_croppable = False

    keys: Tensor | None  # [B, K, C, E]
    values: Tensor | None
    lengths_B: Tensor  # int64, tokens stored per row
    positions_B: Tensor  # int64, rotary position of each row's next token in this layer
    longest: int  # no row is longer; kept on the host, so that decoding never waits for the device
    logical: int
    group: int  # layers with the same number share lengths and positions

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain  # the empty layer that this one stands in for
        self.reset()

    def reset(self) -> None:
        """Empties the layer: the next call with this cache is a prefill again."""
        self.keys = self.values = None
        self.is_initialized = False
        self.lengths_B = self.positions_B = torch.zeros(0, dtype=torch.long)
        self.longest = self.logical = self.group = 0

    def store(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> None:
        """Takes the prompts' keys and values [1, K, T, E], rows of `lengths` tokens each."""
        assert sum(lengths) == keys.shape[2], "packed keys and row lengths disagree"
        self.keys, self.values = _unpack(keys, lengths), _unpack(values, lengths)
        self.lengths_B = torch.tensor(lengths, dtype=torch.long, device=keys.device)
        self.longest = max(lengths)
        self.is_initialized = True

    def place(self, positions: Sequence[int], logical: int, group: int) -> None:
        """What `store` cannot see: next rotary positions [B], logical length, layer group."""
        self.positions_B = torch.tensor(positions, dtype=torch.long, device=self.lengths_B.device)
        self.logical, self.group = logical, group

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token per row [1, K, B, E] behind each row and gives back the columns in use.

        The rows do not count it as theirs before `advance`: a row that has no token in this step
        overwrites it in the next.
        """
        assert self.keys is not None and self.values is not None
        if self.longest == self.keys.shape[2]:
            self.keys, self.values = _grow(self.keys), _grow(self.values)
        rows_B = torch.arange(self.lengths_B.shape[0], device=self.lengths_B.device)
        self.keys[rows_B, :, self.lengths_B] = keys[0].transpose(0, 1)
        self.values[rows_B, :, self.lengths_B] = values[0].transpose(0, 1)
        used = self.longest + 1
        return self.keys[:, :, :used], self.values[:, :, :used]

    def advance(self, lengths_B: Tensor, positions_B: Tensor) -> None:
        """Counts the column that `append` wrote: each row's new length and next position [B]."""
        self.lengths_B, self.positions_B = lengths_B, positions_B
        self.longest += 1
        self.logical += 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise self._foreign()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise self._foreign()

    @staticmethod
    def _foreign() -> UserError:
        return UserError(
            "this cache holds a pruned prompt, and only the patched model that filled it can go on "
            f"from it: pass {CACHE}=DynamicCache()"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical + query_length, 0

    def get_seq_length(self) -> int:
        return self.logical

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was, its length and position with it."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices` [new B]."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times in place."""
        self._take(torch.arange(self.lengths_B.shape[0]).repeat_interleave(repeats))

    def _take(self, rows: Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        rows = rows.to(self.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero(as_tuple=True)[0]
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.lengths_B = self.lengths_B.index_select(0, rows)
        self.positions_B = self.positions_B.index_select(0, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Not to be had: columns that a row has skipped cannot be told apart. 0 does nothing."""
        if tokens_to_remove != 0:
            raise UserError(
                "a pruned cache cannot be cropped, so assisted generation is out: leave out "
                "assistant_model and prompt_lookup_num_tokens, or call trio.unpatch(model) first"
            )


def ragged_layers(cache: Any) -> list[RaggedLayer]:
    """The layers of a cache that `make_ragged` changed; empty for every other."""
    layers = getattr(cache, "layers", ())
    return [layer for layer in layers if isinstance(layer, RaggedLayer)]


def make_ragged(cache: Cache, num_layers: int) -> list[RaggedLayer]:
    """Gives an empty dynamic cache one RaggedLayer per decoder layer, in place.

    Raises UserError for a cache that cannot hold rows of different lengths.
    """
    plain = isinstance(cache, DynamicCache) and not cache.offloading
    if not plain or not _are_plain(cache.layers, num_layers):
        raise UserError(
            f"pruning needs a plain DynamicCache for {num_layers} layers, got {cache!r:.200}: pass "
            f"{CACHE}=DynamicCache(), or neither that nor cache_implementation"
        )
    replaced = list(cache.layers) or [DynamicLayer() for _ in range(num_layers)]
    layers = [RaggedLayer(layer) for layer in replaced]
    cache.layers = list(layers)
    cache.layer_class_to_replicate = None
    return layers


def make_plain(cache: Cache) -> None:
    """Turns an emptied ragged cache back into a dynamic one, in place."""
    cache.layers = [layer.plain for layer in ragged_layers(cache)]


def _are_plain(layers: Sequence[Any], num_layers: int) -> bool:
    fits = len(layers) in (0, num_layers)
    return fits and all(type(layer) in _PLAIN_LAYERS for layer in layers)


def _unpack(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    _, heads, _, width = packed.shape
    rows = packed.new_zeros(len(lengths), heads, max(lengths) + GROWTH, width)
    for row, tokens in zip(rows, packed[0].split(list(lengths), dim=1), strict=True):
        row[:, : tokens.shape[1]] = tokens
    return rows


def _grow(tensor: Tensor) -> Tensor:
    rows, heads, _, width = tensor.shape
    return torch.cat([tensor, tensor.new_zeros(rows, heads, GROWTH, width)], dim=2)
