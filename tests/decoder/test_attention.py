"""Each layout against dense attention written out, one sequence at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from trio.decoder import attention
from trio.decoder.attention import (
    Layout,
    Packed,
    Padded,
    ragged_attention,
)

HEADS = 4
DIM = 8


def make(
    kv_heads: int, tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(1, heads, tokens, DIM, generator=generator, dtype=dtype)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return query, key, value


def run(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    return ragged_attention(nn.Module(), query, key, value, None, layout=layout)[0]


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """`[H, Q, E]`, `[K, S, E]`, seen `[Q, S]` to `[Q, H, E]`."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * DIM**-0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize(
    ("kv_heads", "lengths"), [(4, (5,)), (2, (3, 3, 3)), (1, (1, 6, 6, 2)), (2, (4, 1, 1, 4))]
)
def test_packed(kv_heads: int, lengths: tuple[int, ...]) -> None:
    query, key, value = make(kv_heads, sum(lengths))
    out, weights = ragged_attention(nn.Module(), query, key, value, None, layout=Packed(lengths))
    assert weights is None
    assert out.shape == (1, sum(lengths), HEADS, DIM)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        expected = dense(query[0, :, part], key[0, :, part], value[0, :, part], seen)
        torch.testing.assert_close(out[0, part], expected)
        start += length


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_padded(kv_heads: int) -> None:
    valid, width = [3, 9, 1, 6], 9
    query = make(kv_heads, len(valid))[0]
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(
        2, len(valid), kv_heads, width, DIM, generator=generator, dtype=torch.float64
    )
    for request, length in enumerate(valid):
        key[request, :, length:] = 1e4  # what lies behind must not be seen
        value[request, :, length:] = 1e4
    layout = Padded(torch.tensor(valid))
    out, _ = ragged_attention(nn.Module(), query, key, value, None, layout=layout)
    assert out.shape == (1, len(valid), HEADS, DIM)
    for request, length in enumerate(valid):
        seen = torch.ones(1, length, dtype=torch.bool)
        expected = dense(
            query[0, :, request : request + 1],
            key[request, :, :length],
            value[request, :, :length],
            seen,
        )
        torch.testing.assert_close(out[0, request : request + 1], expected)


def test_scaling_is_honoured() -> None:
    query, key, value = make(2, 6)
    half, _ = ragged_attention(nn.Module(), query, key, value, None, 0.5, layout=Packed((6,)))
    other, _ = ragged_attention(
        nn.Module(), query * 0.5 * DIM**0.5, key, value, None, layout=Packed((6,))
    )
    torch.testing.assert_close(half, other)


def test_torch_kernel_call_with_and_without_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no CPU form; its call is checked against a stand-in with its signature."""
    query, key, value = (x[0].transpose(0, 1) for x in make(2, 9))
    layout = Packed((4, 5))
    offsets = layout.offsets_on(query.device)
    assert offsets.tolist() == [0, 4, 9]
    assert offsets.dtype == torch.int32
    expected = run(*make(2, 9), layout)

    def old(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert query.shape == key.shape == value.shape
        assert window_size == (-1, 0)
        assert max_q == max_k == 5
        lengths = tuple(cu_seq_q.diff().tolist())
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        assert scale == DIM**-0.5
        return run(q, k, v, Packed(lengths))[0]

    def new(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        assert enable_gqa
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return old(query, key, value, *rest, **options)

    for stand_in in (old, new):
        monkeypatch.setattr(varlen, "varlen_attn", stand_in)
        out = attention._torch_kernel()(query, key, value, offsets, 5, DIM**-0.5)
        torch.testing.assert_close(out, expected[0])


FLASH_ATTN = {
    "as version 4": ("flash_attn/cute/__init__.py", "", "_torch_kernel", 1),
    "of another torch": (
        "flash_attn/__init__.py",
        "raise ImportError('undefined symbol: c10')",
        "_torch_kernel",
        1,
    ),
    "usable": ("flash_attn/__init__.py", "flash_attn_varlen_func = print", "_flash_attn_kernel", 0),
}


@pytest.mark.parametrize("kind", FLASH_ATTN)
def test_flash_attn_serves_if_it_has_the_kernel_and_else_torch(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, text, kernel, lines = FLASH_ATTN[kind]
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found: Any = attention._cuda_kernel.__wrapped__(torch.device("cuda", 0))
    sys.modules.pop("flash_attn", None)
    assert found.__qualname__.split(".")[0] == kernel
    assert [r.message for r in caplog.records if "not usable" in r.message] == caplog.messages
    assert len(caplog.messages) == lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_cuda_kernel_agrees(kv_heads: int) -> None:
    lengths = (70, 3, 128)
    query, key, value = (x.repeat(1, 1, 1, 8) for x in make(kv_heads, sum(lengths), torch.float32))
    expected, _ = ragged_attention(nn.Module(), query, key, value, None, layout=Packed(lengths))
    q, k, v = (x.cuda().bfloat16() for x in (query, key, value))
    out = run(q, k, v, Packed(lengths))
    torch.testing.assert_close(out.float().cpu(), expected, atol=3e-2, rtol=3e-2)
