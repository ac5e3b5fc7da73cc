"""The decode kernel: its code for a GPU, and what is done without it."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch

from trio.decoder import attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and sys.platform != "linux",
    reason="Triton is for Linux",
)


@pytest.mark.parametrize(("group", "parts"), [(1, 1), (7, 4)])
def test_the_kernel_compiles_for_a_gpu(group: int, parts: int) -> None:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trio.decoder import paged_kernel

    out = "*fp32" if parts > 1 else "*bf16"
    shape = {"HEADS": 4, "PARTS": parts, "GROUP": group, "DIM": 128, "WIDTH": 128}
    steps = {"PAGE": 16, "BLOCK": paged_kernel.BLOCK, "WIDEN": group == 1}
    numbers = ("head_stride", "row_stride", "table_stride", "length_stride")
    arguments: dict[str, Any] = {
        **dict.fromkeys(("query", "key", "value"), "*bf16"),
        "table": "*i32",
        "lengths": "*i64",
        "out": out,
        "norms": out,
        "scale": "fp32",
        **dict.fromkeys(numbers, "i32"),
    }
    attend = {**shape, **steps, "QUERIES": 1 if group == 1 else 16}
    merge = {**shape, "QUERIES": 8}
    for kernel, given, constants in (
        (paged_kernel._attend, arguments, attend),
        (paged_kernel._merge, {"partial": "*fp32", "norms": "*fp32", "out": "*bf16"}, merge),
    ):
        signature = {**given, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, signature, constexprs=constants)
        assert compiled(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


SIZES = 4, 16, 2, 8


def test_without_triton_a_gpu_copies_pages_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found: Any = attention._paged_kernel.__wrapped__
    assert found(torch.device("cuda"), torch.float32, SIZES) is None
    assert found(torch.device("cpu"), torch.float32, SIZES) is None
    assert len(caplog.messages) == 1 and "no Triton" in caplog.messages[0]


def test_where_the_kernel_fails_pages_are_copied_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton import knobs

    def fails(*arguments: Any) -> None:
        raise subprocess.CalledProcessError(1, ["cc", "launcher.c"])

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    monkeypatch.setattr("trio.decoder.paged_kernel.attend_pages", fails)
    found: Any = attention._paged_kernel.__wrapped__
    assert found(torch.device("cpu"), torch.float32, SIZES) is None
    assert len(caplog.messages) == 1 and "its kernel fails: CalledProcessError" in caplog.text
