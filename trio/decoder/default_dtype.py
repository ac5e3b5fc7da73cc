"""What dtype a model is loaded in where nobody says it. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
HALVES = ("bfloat16", "float16")


def on_a_gpu(saved: str | None) -> tuple[str, str]:
    """Name of the dtype, and why; for one with bfloat16, which all of compute capability 8 have.

    Tokens are scored with gradients, which float16 does not hold, and float32 takes kernels that
    are many times slower.

    Args:
        saved: the checkpoint's own; None where its config does not say it.
    """
    if saved in (None, "bfloat16"):
        return "bfloat16", "as GPUs are quickest in it and hold gradients"
    return "bfloat16", f"the checkpoint is {saved}; --dtype (dtype) {saved} keeps to that"


def on_a_cpu(saved: str | None, cpuinfo: Path = CPUINFO) -> tuple[str, str]:
    """The same for this machine's CPU. The answer differs by machine, and answers with it."""
    if saved is None:
        return "float32", "the checkpoint's config.json, as far as it is here, names none"
    if saved not in HALVES:
        return "float32", "the checkpoint is no half precision"
    if not has_matrix_units(cpuinfo):
        return "float32", "this CPU has no matrix units for bfloat16 (amx_bf16)"
    return "bfloat16", f"the checkpoint is {saved}, and this CPU has matrix units (amx_bf16)"


def has_matrix_units(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware, as Linux tells it of x86."""
    try:
        return re.search(r"^flags\s*:.*\bamx_bf16\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def saved_dtype(config: Mapping[str, Any]) -> str | None:
    """What a config.json says of its checkpoint; older ones say it under another name, or of the
    text decoder alone."""
    text = config.get("text_config") or {}
    for part in (config, text):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                return str(part[key]).removeprefix("torch.")
    return None
