"""Norm, rotation and SwiGLU of a decoder layer as one Triton kernel each; import only where Triton
is, which CUDA builds of PyTorch bring.

They compute in float32 and round where transformers' own operations round, so that results are the
same but for the order of sums in the norm.

Shapes: T packed tokens, N rows of D numbers, H query heads, K key/value heads, E head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 1024


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of `x [..., D]` over its last dimension, times `weight [D]`."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, x, weight, x, out, epsilon, adds=False)
    return out


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x + added`, both `[..., D]`, and its RMS norm."""
    x, added = x.contiguous(), added.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, added, weight, total, out, epsilon, adds=True)
    return total, out


def _launch_norm(
    x: Tensor, added: Tensor, weight: Tensor, total: Tensor, out: Tensor, epsilon: float, adds: bool
) -> None:
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    norm[(x.numel() // width,)](
        x,
        added,
        weight,
        total,
        out,
        width,
        epsilon,
        ADDS=adds,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def rotate_(query_THE: Tensor, key_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> None:
    """Turn heads by the angles of their tokens, in place; all contiguous."""
    tokens, heads, dim = query_THE.shape
    kv_heads = key_TKE.shape[1]
    rotate[(tokens,)](
        query_THE,
        key_TKE,
        cos_TE.contiguous(),
        sin_TE.contiguous(),
        heads,
        kv_heads,
        dim // 2,
        HEADS=triton.next_power_of_2(heads),
        KV_HEADS=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(dim // 2),
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of equal shapes, contiguous."""
    out = torch.empty_like(gate)
    activate[(triton.cdiv(gate.numel(), _PIECE),)](gate, up, out, gate.numel(), BLOCK=_PIECE)
    return out


@triton.jit
def norm(  # type: ignore[no-untyped-def]
    x,
    added,
    weight,
    total,
    out,
    width,
    epsilon,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. `total` is written only where `ADDS`."""
    first = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, BLOCK)
    inside = place < width
    own = tl.load(x + first + place, mask=inside, other=0.0)
    kind = own.dtype
    wide = own.to(tl.float32)
    if ADDS:
        wide += tl.load(added + first + place, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(kind).to(tl.float32)
        tl.store(total + first + place, wide.to(kind), mask=inside)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    normed = (wide * inverse).to(kind).to(tl.float32)
    normed *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + place, normed.to(kind), mask=inside)


@triton.jit
def rotate(  # type: ignore[no-untyped-def]
    query,
    key,
    cos,
    sin,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, HALF)
    inside = place < half
    angle = token * 2 * half + place
    cos_left = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_right = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_left = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_right = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    for which in tl.static_range(2):
        x = key if which else query
        count = kv_heads if which else heads
        head = tl.arange(0, KV_HEADS if which else HEADS)
        there = (head < count)[:, None] & inside[None, :]
        at = (token * count + head)[:, None] * 2 * half + place[None, :]
        left, right = tl.load(x + at, mask=there), tl.load(x + at + half, mask=there)
        kind = left.dtype
        left, right = left.to(tl.float32), right.to(tl.float32)
        new_left = (left * cos_left).to(kind).to(tl.float32)
        new_left -= (right * sin_left).to(kind).to(tl.float32)
        new_right = (right * cos_right).to(kind).to(tl.float32)
        new_right += (left * sin_right).to(kind).to(tl.float32)
        tl.store(x + at, new_left.to(kind), mask=there)
        tl.store(x + at + half, new_right.to(kind), mask=there)


@triton.jit
def activate(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of all elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    swish = (wide / (1.0 + tl.exp(-wide))).to(x.dtype).to(tl.float32)
    swish *= tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, swish.to(x.dtype), mask=inside)
