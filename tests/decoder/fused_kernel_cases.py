"""Kernels of a decoder layer in Triton's interpreter, against what transformers computes; and the
decode kernel, see `paged_kernel_cases`.

A program of its own: Triton reads `TRITON_INTERPRET` when it is imported.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.decoder import paged_kernel_cases
from tests.tiny.llava import Family, tiny_llava
from tests.tiny.qwen2_5_vl import tiny_qwen
from trio.decoder import gpu
from trio.decoder.attention import Packed
from trio.decoder.decoder import Decoder
from trio.decoder.fused import fused_kernels

# The interpreter cuts float32 off where it makes bfloat16 of it, devices round: two roundings in a
# row may be two units off.
ULPS = {torch.float32: 4, torch.float16: 1, torch.bfloat16: 4}


def close(got: Tensor, wanted: Tensor) -> None:
    unit = torch.finfo(wanted.dtype).eps * wanted.abs().clamp(min=wanted.abs().mean())
    off = ((got - wanted).abs() / unit).max()
    assert off <= ULPS[wanted.dtype], (wanted.dtype, tuple(wanted.shape), off)


def norms(dtype: torch.dtype, rows: int, width: int) -> None:
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.normal_()
    x, added = (torch.randn(rows, width).to(dtype) for _ in range(2))
    close(fused_kernels.rms_norm(x, norm.weight, 1e-5), norm(x))
    heads = x.unflatten(-1, (2, -1)).transpose(0, 1)
    assert not heads.is_contiguous() or rows == 1
    half = LlamaRMSNorm(width // 2, eps=1e-5).to(dtype)
    close(fused_kernels.rms_norm(heads, half.weight, 1e-5), half(heads))
    total, normed = fused_kernels.add_rms_norm(x, added, norm.weight, 1e-5)
    close(total, x + added)
    close(normed, norm(total))


def rotations(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    query, key = (torch.randn(tokens, count, dim).to(dtype) for count in (heads, kv_heads))
    cos, sin = (torch.randn(tokens, dim).to(dtype) for _ in range(2))
    wanted = apply_rotary_pos_emb(query, key, cos, sin)
    fused_kernels.rotate_(query, key, cos, sin)
    close(query, wanted[0])
    close(key, wanted[1])


def activations(dtype: torch.dtype, *shape: int) -> None:
    gate, up = (torch.randn(shape).to(dtype) for _ in range(2))
    close(fused_kernels.swiglu(gate, up), F.silu(gate) * up)


def whole_layers(model: Any) -> None:
    """As they run on a GPU, in float32."""
    decoder = Decoder(model.model.language_model, model.lm_head)
    hidden_TD, lengths = torch.randn(9, decoder.hidden_size), (4, 5)
    outs = []
    for fuses in (False, True):
        gpu._pretended = fuses
        with decoder.ragged():
            if fuses:
                decoder.fuse()
                assert decoder.fused
            rotary = decoder.rotary(torch.arange(len(hidden_TD)))
            layers = decoder.num_layers
            outs.append(decoder.run_layers(0, layers, hidden_TD, rotary, Packed(lengths), None))
    gpu._pretended = False
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    for dtype in ULPS:
        for rows, width in product((1, 3), (24, 128, 4096)):
            norms(dtype, rows, width)
        for sizes in ((1, 1, 1, 2), (5, 4, 2, 12), (3, 8, 8, 64), (2, 28, 4, 128)):
            rotations(dtype, *sizes)
        activations(dtype, 7, 333)
        activations(dtype, 1, 1024)
    families: tuple[Family, ...] = ("mistral", "qwen3")
    for family in families:
        whole_layers(tiny_llava(family=family, layers=2))
    whole_layers(tiny_qwen(layers=2))


if __name__ == "__main__":
    main()
    paged_kernel_cases.main(12)
