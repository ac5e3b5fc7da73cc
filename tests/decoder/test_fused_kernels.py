"""Norm, rotation and SwiGLU as kernels: right in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Triton is for Linux; there it must not be missing"
)


def program(name: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.decoder.{name}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_kernels_equal_transformers_in_the_interpreter() -> None:
    program("fused_kernel_cases", TRITON_INTERPRET="1")


def test_kernels_compile_for_sm_90() -> None:
    program("fused_kernels_compiled", TRITON_INTERPRET="0")
