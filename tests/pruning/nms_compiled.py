"""Compiles the kernel for sm_90; import only where Triton is, and does not run its interpreter."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trio.pruning.selection.nms_kernel import choose

_POINTERS = {
    "dots": "*fp32",
    "norms": "*fp32",
    "places": "*fp32",
    "orders": "*i64",
    "counts": "*i64",
    "keeps": "*i64",
    "stays": "*u8",
}
_NUMBERS = {"most": "i32", "threshold": "fp32", "nearness": "fp32", "fall": "fp32"}


def main() -> None:
    for part, width in ((1, 128), (4, 4096), (4, 16384)):
        constants = {"PART": part, "WIDTH": width}
        signature = {**_POINTERS, **_NUMBERS, **dict.fromkeys(constants, "constexpr")}
        compiled = triton.compile(
            ASTSource(fn=choose, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": min(32, max(4, width // 256))},
        )
        assert compiled.asm["cubin"], width
