"""Attention over ragged batches, as a function of transformers' attention registry.

One call serves many prompts of different lengths without padding and without a mask of the
batch's size. The keyword argument `layout` says how the tokens of a call belong together.

Shapes: T packed tokens, B requests, S or L keys of one request, H query heads, K key/value heads,
G query heads of each, E head dimension, W pages of a request at most.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from trio.decoder.gpu import on_gpu, sent
from trio.errors import first_line, kind_and_line

NAME = "trio_ragged"
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Packed:
    """Whole sequences back to back; causal attention inside each."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in order, every one >= 1."""
    _offsets: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, T, E]`, `key` and `value [1, K, T, E]` to `[1, T, H, E]`."""
        return _packed(query, key, value, scale, self)

    def offsets_on(self, device: torch.device) -> Tensor:
        """Cumulative lengths, int32 `[B + 1]`."""
        if device not in self._offsets:
            bounds = [0, *accumulate(self.lengths)]
            self._offsets[device] = sent(torch.tensor(bounds, dtype=torch.int32), device)
        return self._offsets[device]


@dataclass(slots=True, eq=False)
class Padded:
    """One query of each request against its own left-aligned keys, in one rectangle."""

    key_lengths_B: Tensor
    """Valid keys of each request, an integer tensor on the queries' device."""
    _masks: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, B, E]`, `key` and `value [B, K, L, E]` to `[1, B, H, E]`."""
        query_BKGE = _by_key_head(query, key.shape[1])
        mask = self.mask(key.shape[2])
        out = F.scaled_dot_product_attention(query_BKGE, key, value, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)[None]

    def mask(self, width: int) -> Tensor:
        """True where a key counts, `[B, 1, 1, width]`."""
        if width not in self._masks:
            positions = torch.arange(width, device=self.key_lengths_B.device)
            self._masks[width] = (positions < self.key_lengths_B[:, None])[:, None, None]
        return self._masks[width]


def _by_key_head(query: Tensor, kv_heads: int) -> Tensor:
    """`[1, H, B, E]` to `[B, K, G, E]`: the queries of a key head stand as rows of it, so that no
    key or value is repeated."""
    return query[0].transpose(0, 1).unflatten(1, (kv_heads, -1)).contiguous()


@dataclass(slots=True, eq=False)
class Paged:
    """Decoding on a GPU: one query of each request against its own keys, which lie in pages."""

    table_BW: Tensor
    """Each request's pages of this layer in order, int32."""
    lengths_B: Tensor
    """Keys of each request; 0 gives zeros, or anything."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, B, E]`, `key` and `value [pages, PAGE, K, E]` to `[1, B, H, E]`."""
        kernel = _paged_kernel(query.device, query.dtype, (query.shape[1], *key.shape[1:]))
        if kernel is not None:
            return kernel(query[0], key, value, self.table_BW, self.lengths_B, scale)[None]
        rectangle = Padded(self.lengths_B.clamp(min=1))
        return rectangle.attend(query, self.gathered(key), self.gathered(value), scale)

    def gathered(self, pages: Tensor) -> Tensor:
        """`[B, K, W * PAGE, E]`, zeros behind a request's keys: what lies there may be NaN, which
        times a weight of zero is NaN."""
        own_BWPKE = pages.index_select(0, self.table_BW.flatten()).unflatten(0, self.table_BW.shape)
        rows_BLKE = own_BWPKE.flatten(1, 2)
        mask_BL = Padded(self.lengths_B).mask(rows_BLKE.shape[1])[:, 0, 0]
        return rows_BLKE.masked_fill(~mask_BL[..., None, None], 0).transpose(1, 2)


class Run(NamedTuple):
    """Requests with as many keys each, whose memory lies at equal distances."""

    requests: int
    length: int
    """Keys of each."""
    heads: int
    """Elements from a head's first key to the next head's."""
    start: int
    """Element that the first request's keys begin at."""
    step: int
    """Elements from one request to the next."""

    def view(self, pages: Tensor) -> Tensor:
        """Their keys in `[pages, PAGE, K, E]`: `[requests, K, length, E]`."""
        kv_heads, dim = pages.shape[2:]
        shape, strides = (
            (self.requests, kv_heads, self.length, dim),
            (self.step, self.heads, dim, 1),
        )
        return pages.as_strided(shape, strides, pages.storage_offset() + self.start)


@dataclass(slots=True, eq=False)
class InRuns:
    """Decoding on a CPU: each request's keys lie in neighbouring pages, head after head.

    Measured: with token after token, attention takes twice as long, and copying the pages together
    4 times as long. Keys behind a request's own are not read.
    """

    runs: Sequence[Run]
    order_B: Tensor | None = None
    """Which request of the call comes where in the runs; None: in the same order."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, B, E]`, `key` and `value [pages, PAGE, K, E]` to `[1, B, H, E]`."""
        query_BKGE = _by_key_head(query, key.shape[2])
        if self.order_B is not None:
            query_BKGE = query_BKGE[self.order_B]
        pieces = [
            F.scaled_dot_product_attention(own, run.view(key), run.view(value), scale=scale)
            for own, run in zip(
                query_BKGE.split([run.requests for run in self.runs]), self.runs, strict=True
            )
        ]
        out_BHE = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).flatten(1, 2)
        if self.order_B is not None:
            out_BHE = torch.empty_like(out_BHE).index_copy_(0, self.order_B, out_BHE)
        return out_BHE[None]


@dataclass(slots=True, eq=False)
class Branches:
    """Continuations of stored prompts, several of each, packed back to back.

    A token sees all stored keys of its request, and of the new ones those of its own branch up to
    itself. Stored and new keys come in one rectangle, the new ones right of the stored.
    """

    request_T: Tensor
    """Row of the rectangle that each token belongs to."""
    place_T: Tensor
    """Its place among the new tokens of that row."""
    mask_B1WL: Tensor
    """`[B, 1, W, L + W]`, W new tokens and L stored ones at most: True where one sees a key."""

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> Branches:
        """For branches of these lengths, of each request; without stored keys yet."""
        branch_BW = torch.full((len(lengths), max(map(sum, lengths))), -1)
        for row, counts in enumerate(lengths):
            branch_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            branch_BW[row, : len(branch_T)] = branch_T
        same = branch_BW[:, :, None] == branch_BW[:, None]
        request_T, place_T = (sent(x, device) for x in (branch_BW >= 0).nonzero(as_tuple=True))
        return cls(request_T, place_T, sent(same.tril()[:, None], device))

    def behind(self, stored_B: Tensor, width: int) -> Branches:
        """The same behind so many stored keys of each request, in rectangles of that width."""
        places = torch.arange(width, device=stored_B.device)
        seen = (places < stored_B[:, None])[:, None, None].expand(-1, 1, self.width, -1)
        return Branches(self.request_T, self.place_T, torch.cat([seen, self.mask_B1WL], dim=-1))

    @property
    def width(self) -> int:
        return self.mask_B1WL.shape[2]

    def rectangle(self, packed: Tensor) -> Tensor:
        """`[1, H, T, E]` to `[B, H, W, E]`; zeros where no token stands."""
        _, heads, _, dim = packed.shape
        shape = len(self.mask_B1WL), heads, self.width, dim
        out = packed.new_zeros(shape)
        out[self.request_T, :, self.place_T] = packed[0].transpose(0, 1)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, T, E]`, `key` and `value [B, K, L + W, E]` to `[1, T, H, E]`.

        As in decoding, the queries of a key head's group stand as rows of it: with a mask, older
        kernels know no grouped heads.
        """
        requests, kv_heads, _, dim = key.shape
        heads = query.shape[1]
        group = heads // kv_heads
        query_BKWE = self.rectangle(query).reshape(requests, kv_heads, group * self.width, dim)
        out = F.scaled_dot_product_attention(
            query_BKWE, key, value, attn_mask=self.mask_B1WL.repeat(1, 1, group, 1), scale=scale
        )
        out = out.reshape(requests, heads, self.width, dim)
        return out[self.request_T, :, self.place_T][None]


class Layout(Protocol):
    """How the tokens of a call belong together: what an attention layer is to compute."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`[1, H, ., E]` and what the cache gave of keys and values to `[1, ., H, E]`."""
        ...


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch.

    Args:
        query: `[1, H, T, E]`; in decoding T is the number of requests.
        key, value: what the layout takes; for Packed `[1, K, T, E]`.
        layout: how tokens belong together. None leaves the call to transformers' own `sdpa`, so
            that a model switched to this function still works as usual outside the engine.

    Returns:
        `[1, T, H, E]` and None (no attention weights).
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(query, key, value, scale), None


def _packed(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Packed) -> Tensor:
    kernel = _varlen_kernel(query.device, query.dtype)
    if kernel is not None:
        out_THE = kernel(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            layout.offsets_on(query.device),
            max(layout.lengths),
            scale,
        )
        return out_THE[None]
    heads, kv_heads = query.shape[1], key.shape[1]
    pieces = []
    for start, length, count in _equals(layout.lengths):
        stop = start + length * count
        own_q, own_k, own_v = (_split(x[:, :, start:stop], count) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            own_q,
            own_k,
            own_v,
            is_causal=True,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        pieces.append(out.transpose(1, 2).reshape(1, length * count, heads, -1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _equals(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal neighbours: (first token, length of one, how many)."""
    start = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        yield start, length, count
        start += length * count


def _split(x: Tensor, count: int) -> Tensor:
    """`[1, H, count * S, E]` to `[count, H, S, E]`, a view."""
    _, heads, tokens, dim = x.shape
    return x.view(heads, count, tokens // count, dim).transpose(0, 1) if count > 1 else x


PagedKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@functools.cache
def _paged_kernel(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> PagedKernel | None:
    """None where tensors of this kind cannot be given to Triton.

    `sizes`: query heads, tokens of a page, key heads, head dimension.
    """
    try:
        from triton import knobs

        from trio.decoder.paged_kernel import attend_pages
    except ImportError as error:
        if device.type == "cuda":
            _log.warning("decoding copies keys and values: no Triton (%s)", first_line(error))
        return None
    if dtype == torch.float64 or not (device.type == "cuda" or knobs.runtime.interpret):
        return None
    try:
        _try_kernel(attend_pages, device, dtype, sizes)
    except Exception as error:  # of a compiler that is missing, or of what this device has not
        _log.warning("decoding copies keys and values: its kernel fails: %s", kind_and_line(error))
        return None
    return attend_pages


def _try_kernel(
    kernel: PagedKernel,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
) -> None:
    """One key of one row."""
    heads, *page = sizes
    query = torch.zeros(heads, 1, page[-1], dtype=dtype, device=device)
    keys = query.new_zeros(1, *page)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lengths = torch.ones(1, dtype=torch.int64, device=device)
    kernel(query, keys, keys, table, lengths, 1.0)


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def _varlen_kernel(device: torch.device, dtype: torch.dtype) -> VarlenKernel | None:
    """A causal variable-length kernel `(q [T, H, E], k, v, offsets, longest, scale)`, if any."""
    if not on_gpu(device) or dtype not in (torch.float16, torch.bfloat16):
        return None
    return _cuda_kernel(device)


@functools.cache
def _cuda_kernel(device: torch.device) -> VarlenKernel | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return _flash_attn_kernel() or _torch_kernel()


def _flash_attn_kernel() -> VarlenKernel | None:
    """None where it is not installed, or what is installed has another interface (version 4) or
    was built for another torch."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError) as error:
        _log.warning(
            "flash-attn is installed and not usable (%s): attention goes through torch's kernel; "
            "install flash-attn>=2.7 and <4 built for this torch, or none",
            first_line(error),
        )
        return None

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float
    ) -> Tensor:
        return flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest, softmax_scale=scale, causal=True
        )

    return kernel


def _torch_kernel() -> VarlenKernel:
    from torch.nn.attention.varlen import varlen_attn

    # Older versions of the kernel have no grouped heads: there the key heads are repeated.
    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        extra: dict[str, Any] = {}
        if group > 1 and has_gqa:
            extra["enable_gqa"] = True
        elif group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = varlen_attn(
            q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0), **extra
        )
        assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for
        return out

    return kernel


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
