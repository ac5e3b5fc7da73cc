"""Norm, rotation and SwiGLU as kernels: right in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Triton is for Linux; there it must not be missing"
)


def interpreted(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error::RuntimeWarning"),
            *("-m", f"tests.decoder.{program}", *arguments),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


def test_kernels_agree_with_transformers_and_sdpa_in_the_interpreter() -> None:
    interpreted("fused_kernel_cases")


@pytest.mark.slow
def test_the_decode_kernel_agrees_in_many_cases() -> None:
    interpreted("paged_kernel_cases", "300")


def test_kernels_compile_for_sm_90() -> None:
    from tests.decoder import fused_kernels_compiled

    fused_kernels_compiled.main()
