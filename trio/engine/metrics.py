"""Counters of an engine. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Counters:
    """Sums and peaks since the last reset; seconds are wall time of the engine's own thread."""

    requests: int = 0
    failed: int = 0
    images: int = 0
    """Like the tokens of prompts and answers, of `requests`, and once for each of them."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    """Prefill without encoding, pruning included."""
    prune_s: float = 0.0
    decode_s: float = 0.0
    idle_s: float = 0.0
    """Between steps, with nothing to do."""
    decode_steps: int = 0
    decode_rows: int = 0
    """Running requests, summed over decode steps."""
    kv_used_bytes_peak: int = 0
    out_of_memory: int = 0
    """Times that the device ran out of memory."""

    def as_dict(self) -> dict[str, Any]:
        """All counters, and the mean number of requests that ran together in a decode step."""
        running = self.decode_rows / self.decode_steps if self.decode_steps else None
        return {**asdict(self), "running_mean": running}
