"""Decode attention over paged keys and values, as Triton kernels; import only where Triton is.

FlashAttention's paged kernels want pages of 256 tokens, most of which a pruned request would leave
empty; these take pages of any size.
Shapes: B rows, K key/value heads, G query heads of each, E head dimension, W pages of a row at
most, S parts that a row's keys are divided into.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Keys that are read at a time."""
_PROGRAMS = 512
"""Programs that keep a large GPU busy: with fewer rows, each row's keys are divided."""
_MOST_PARTS = 16


def attend_pages(
    query_HBE: Tensor,
    key: Tensor,
    value: Tensor,
    table_BW: Tensor,
    lengths_B: Tensor,
    scale: float,
) -> Tensor:
    """One query of each row against that row's keys; zeros for rows of length 0.

    Args:
        query_HBE: E is contiguous; H = K · G heads.
        key, value: `[pages, PAGE, K, E]`, contiguous.
        table_BW: int32, a row's pages in order; W is contiguous.
        lengths_B: keys of each row.

    Returns:
        `[B, H, E]`.
    """
    assert query_HBE.stride(2) == 1 and key.is_contiguous() and value.is_contiguous()
    heads, rows, dim = query_HBE.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    parts = min(_MOST_PARTS, max(1, _PROGRAMS // (rows * kv_heads)))
    out = torch.empty(rows, heads, dim, dtype=query_HBE.dtype, device=query_HBE.device)
    shape: dict[str, int] = {
        "GROUP": group,
        "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
    }
    # Products of matrices need 16 rows; a single query is summed by hand. Triton's interpreter
    # multiplies matrices of bfloat16 as if they were whole numbers.
    shape["QUERIES"] = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    shape["WIDEN"] = group == 1 or triton.knobs.runtime.interpret
    partial, norms = out, out
    if parts > 1:
        shape_of_parts = (rows, kv_heads, parts, group)
        partial = torch.empty(*shape_of_parts, dim, dtype=torch.float32, device=out.device)
        norms = torch.empty(shape_of_parts, dtype=torch.float32, device=out.device)
    kernel: Any = _attend
    kernel[(rows, kv_heads, parts)](
        query_HBE, key, value, table_BW, lengths_B, partial, norms, scale * LOG2_E,
        query_HBE.stride(0), query_HBE.stride(1), table_BW.stride(0), lengths_B.stride(0),
        HEADS=kv_heads, PAGE=key.shape[1], PARTS=parts, BLOCK=BLOCK, **shape,
    )  # fmt: skip
    if parts > 1:
        merge: Any = _merge
        merge[(rows, kv_heads)](
            partial, norms, out, HEADS=kv_heads, PARTS=parts, GROUP=group, DIM=dim,
            WIDTH=shape["WIDTH"], QUERIES=triton.next_power_of_2(group),
        )  # fmt: skip
    return out


LOG2_E = 1.4426950408889634


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, table, lengths, out, norms, scale,
    head_stride, row_stride, table_stride, length_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One program is a part of one row's keys, of one head of them: a softmax on the way.

    With one part `out` is the outcome; with several it is each part's, and `norms` the base-2
    logarithm of the sum that it was divided by. `WIDTH`, `QUERIES`: `DIM`, `GROUP` rounded up.
    `WIDEN`: sum products in float32, not on tensor cores.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row * length_stride).to(tl.int32)
    each = tl.cdiv(tl.cdiv(length, BLOCK), PARTS) * BLOCK
    start = part * each
    stop = tl.minimum(start + each, length)
    member, place = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    in_dim = place < DIM
    there = (member < GROUP)[:, None] & in_dim[None, :]
    row_head = row * HEADS + head
    asked = query + row * row_stride + (head * GROUP + member)[:, None] * head_stride
    queries = tl.load(asked + place[None, :], mask=there, other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        is_key = token < stop
        page = tl.load(table + row * table_stride + token // PAGE, mask=is_key, other=0)
        # Elements of a pool pass 2^31.
        slot = (page.to(tl.int64) * PAGE + token % PAGE) * HEADS + head
        inside = is_key[:, None] & in_dim[None, :]
        # What lies behind a row's keys may be anything, also NaN, so it is not read.
        keys = tl.load(key + slot[:, None] * DIM + place[None, :], mask=inside, other=0.0)
        values = tl.load(value + slot[:, None] * DIM + place[None, :], mask=inside, other=0.0)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        if QUERIES == 1:
            scores = tl.sum(queries * keys, axis=1)[None, :]
        else:
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(is_key[None, :], scores * scale, float("-inf"))
        grown = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - grown[:, None])
        shrunk = tl.exp2(largest - grown)
        if QUERIES == 1:
            added = tl.sum(tl.trans(weights) * values, axis=0)[None, :]
        else:
            added = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        summed = summed * shrunk[:, None] + added
        total = total * shrunk + tl.sum(weights, axis=1)
        largest = grown
    divisor = tl.where(total == 0.0, 1.0, total)
    outcome = summed / divisor[:, None]
    own = (row_head * PARTS + part) * GROUP + member
    if PARTS > 1:
        norm = tl.where(total == 0.0, float("-inf"), largest + tl.log2(divisor))
        tl.store(norms + own, norm, mask=member < GROUP)
    target = out + own[:, None] * DIM + place[None, :]
    tl.store(target, outcome.to(out.dtype.element_ty), mask=there)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partial, norms, out,
    HEADS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Parts of one row and head into one, each with the weight of its sum."""
    row_head = tl.program_id(0) * HEADS + tl.program_id(1)
    member, place = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    in_group = member < GROUP
    there = in_group[:, None] & (place < DIM)[None, :]
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    for part in range(PARTS):
        own = (row_head * PARTS + part) * GROUP + member
        largest = tl.maximum(largest, tl.load(norms + own, mask=in_group, other=float("-inf")))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for part in range(PARTS):
        own = (row_head * PARTS + part) * GROUP + member
        norm = tl.load(norms + own, mask=in_group, other=float("-inf"))
        weight = tl.exp2(norm - largest)
        piece = tl.load(partial + own[:, None] * DIM + place[None, :], mask=there, other=0.0)
        summed += weight[:, None] * piece
        total += weight
    outcome = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    own = row_head * GROUP + member
    target = out + own[:, None] * DIM + place[None, :]
    tl.store(target, outcome.to(out.dtype.element_ty), mask=there)
