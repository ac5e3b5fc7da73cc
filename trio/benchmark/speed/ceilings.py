"""The hardware's limits: FLOP/s and GB/s, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_SIDE = {"cpu": 2048, "cuda": 8192}
_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """flops: per second, of one large matrix product, two per multiply-add. bytes: per second, read
    and written, of one large copy."""

    flops: float
    bytes: float


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several tries each: what disturbs a try only ever makes it slower."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * side**3 / _fastest(lambda: torch.mm(left, right), device),
        bytes=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(work: Callable[[], object], device: torch.device, tries: int = 6) -> float:
    return min(seconds(work, device) for _ in range(tries))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, waited for."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use since it was made: of the device, or of this process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Writing 5 sets the kernel's high-water mark of resident memory back (proc(5)).
            _write(Path("/proc/self/clear_refs"), "5")

    def read(self) -> int | None:
        """Bytes; None where the system keeps no such figure."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(
            (int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), None
        )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError:
        return  # then the peak is that of the whole process so far
