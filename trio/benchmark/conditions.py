"""Under what a figure was measured: printed and stored with it."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from trio import openmp as waiting


def machine(device: torch.device) -> dict[str, Any]:
    """Date, device, threads and how they wait, and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": gpu or _processor(),
        "threads": torch.get_num_threads(),
        "waiting": waiting.describe(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
