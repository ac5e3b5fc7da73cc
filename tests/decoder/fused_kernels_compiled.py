"""Compiles the kernels of a decoder layer for sm_90, which takes no GPU.

To be imported only where Triton is, and does not run its interpreter.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trio.decoder.fused.fused_kernels import activate, norm, rotate

SIZES: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (norm, {"width": "i32", "epsilon": "fp32"}, {"ADDS": False, "BLOCK": 4096}),
    (norm, {"width": "i32", "epsilon": "fp32"}, {"ADDS": True, "BLOCK": 4096}),
    (
        rotate,
        {"heads": "i32", "kv_heads": "i32", "half": "i32"},
        {"HEADS": 32, "KV_HEADS": 8, "HALF": 64},
    ),
    (activate, {"count": "i32"}, {"BLOCK": 1024}),
]


def main() -> None:
    for kernel, numbers, constants in SIZES:
        pointers = set(kernel.arg_names) - set(numbers) - set(constants)
        for kind in ("bf16", "fp16", "fp32"):
            signature = dict.fromkeys(pointers, f"*{kind}") | numbers
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert made.asm["cubin"]
